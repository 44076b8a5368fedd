"""Bytes that mean harm, made from nothing: images, members and indexes; and ways to damage well ones at random."""

import io
import json
import pickle
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from dist_kd.data.index import Index
from dist_kd.data.tar_scan import ROW, ShardInfo, checksum


class Touch:
    """A pickle of this touches a file when it is loaded."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Touch(canary))


def object_array(canary: Path) -> bytes:
    """A .npy whose only element is such a pickle."""
    array, file = np.empty(1, object), io.BytesIO()
    array[0] = Touch(canary)
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def encoded(kind: str, side: int = 8, number: int = 0, mode: str = "RGB", **how) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
    image.save(file, kind, **how)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes | None = None, before: bytes = b"", after: bytes = b"") -> bytes:
    """A grey PNG of one bit a pixel; `before` and `after` are chunks around its pixels, which are zeros."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    if pixels is None:
        pixels = zlib.compress(bytes((1 + -(-width // 8)) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b"")


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def jpeg_of_scans(side: int, scans: int, frame: int = 0xC2, inside: bytes = b"") -> bytes:
    """A grey JPEG that is refined `scans` times: some 70 bytes each make a decoder go over all of it again."""
    blocks = (-(-side // 8)) ** 2
    bits = ("0" + "1" * 14) * -(-blocks // 32767)  # the next 32767 blocks have nothing new
    bits += "1" * (-len(bits) % 8)
    pixels = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    data = b"\xff\xd8" + segment(0xDB, bytes([0]) + bytes([1] * 64))
    data += segment(frame, struct.pack(">BHHB", 8, side, side, 1) + bytes([1, 0x11, 0]))
    data += segment(0xC4, bytes([0x10, 1] + [0] * 15) + b"\xe0") + inside  # code 0: a run of 2^14 and more
    first, other = (segment(0xDA, bytes([1, 1, 0, 1, 63, bits])) + pixels for bits in (0x01, 0x10))
    return data + first + other * (scans - 1) + b"\xff\xd9"


def written_index(place: Path, rows: np.ndarray, infos: list[ShardInfo], **facts) -> Path:
    """An index whose parts fit each other, whatever they say; `facts` replace what index.json says."""
    place.mkdir(parents=True, exist_ok=True)
    classes = ("a", "b")
    index = Index(place, "x", classes, tuple(infos), rows)
    said = {
        "schema": 1,
        "name": "x",
        "fingerprint": index.fingerprint,
        "augment": "none",
        "image_size": None,
        "classes": list(classes),
        "shards": [vars(info) for info in infos],
    }
    (place / "index.json").write_text(json.dumps(said | facts))
    np.save(place / "index.npy", rows)
    return place


def row_of(offset: int, image: bytes, label: int = 0, length: int | None = None) -> np.ndarray:
    return np.array([(offset, len(image) if length is None else length, label, checksum(image))], ROW)


# Damage at random

NUMBERS = [b"0000000", b"7777777", b"77777777777", b"-1", b"\x80\0\0\0\0\0\0\1", b"\xff" * 8, b"\x80" + b"\xff" * 11]
NUMBERS += [b"", b" ", b"8", b"1\0", b"00000001000\0", "\u00b2".encode(), b"9" * 12]
FIELDS = [(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)]  # of a tar's header
KINDS = b"01234567gxLKSVNMDX\0A\xff"


def damaged(seeds: list[bytes], seed: int, most: int = 6, block: int = 1) -> bytes:
    """One of the seeds with 1 to `most` changes: bytes, cuts, copies, splices; in places of multiples of `block`."""
    rng = random.Random(seed)
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, most)):
        place = rng.randrange(len(data) + 1) // block * block
        size = rng.choice((1, 2, 4, block, 4 * block, rng.randrange(len(data) + 1)))
        what = rng.randrange(7)
        if what == 0 and place < len(data):
            data[place] = rng.choice((0, 0xFF, 0x80, data[place] ^ 1 << rng.randrange(8), rng.randrange(256)))
        elif what == 1:
            data[place : place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((0, 1, 2**31, 2**32 - 1, 65535)))
        elif what == 2 and rng.random() < 0.3:
            del data[place:]
        elif what == 3:
            del data[place : place + size]
        elif what == 4:
            data[place:place] = data[place : place + size]
        elif what == 5:
            other = rng.choice(seeds)
            start = rng.randrange(len(other)) // block * block
            data[place : place + (size if rng.random() < 0.5 else 0)] = other[start : start + size]
        elif what == 6:
            data[place : place + size] = rng.randbytes(min(size, 64))
    return bytes(data)


def damaged_tar(seeds: list[bytes], seed: int) -> bytes:
    """A damaged tar whose headers' checksums are right again, so that their fields are believed."""
    rng = random.Random(seed)
    data = bytearray(damaged(seeds, seed, block=rng.choice((1, 512))))
    heads = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    for at in rng.sample(heads, min(len(heads), rng.randint(0, 3))):
        start, size = rng.choice(FIELDS)
        if start == 156:
            data[at + start] = rng.choice(KINDS)
        else:
            data[at + start : at + start + size] = rng.choice((*NUMBERS, rng.randbytes(size))).ljust(size, b"\0")[:size]
    for at in heads if rng.random() < 0.9 else ():
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)
