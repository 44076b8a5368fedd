"""A process that decodes damaged images until it has had enough of them: `fuzz_decode.py COUNT SEED KEPT MAX_PIXELS`.

A process of its own, so that a death inside a decoder is seen: KEPT then holds the image that did it.
"""

import io
import random
import resource
import signal
import sys
from pathlib import Path

import torch
from faults import hostile_bytes as hostile
from PIL import Image

from dist_kd.data.decode import decode_image, image_shape
from dist_kd.errors import DataError

LONGEST_S = 10  # of one image


def seeds() -> list[bytes]:
    """Small images of every kind that is read."""
    found = [hostile.encoded("JPEG", 24, 0, mode, quality=80) for mode in ("RGB", "L", "CMYK")]
    found += [hostile.encoded("JPEG", 24, 1, progressive=True), hostile.encoded("JPEG", 24, 2, subsampling=0)]
    found += [hostile.encoded("JPEG", 24, 3, restart_marker_blocks=1, optimize=True)]
    found += [hostile.encoded("JPEG", 24, 4, exif=exif(), icc_profile=b"p" * 200, comment=b"c")]
    found += [hostile.encoded("PNG", 24, 5, mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
    found += [hostile.encoded("PNG", 24, 6, "P", transparency=bytes(range(16)))]
    found += [
        hostile.encoded("WEBP", 24, 7, mode, lossless=lossless) for mode in ("RGB", "RGBA") for lossless in (0, 1)
    ]
    frames = [Image.open(io.BytesIO(hostile.encoded("PNG", 24, number))) for number in (8, 9)]
    for kind in ("PNG", "WEBP"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        found.append(file.getvalue())
    return [*found, hostile.jpeg_of_scans(24, 12), hostile.png(24, 24)]


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x011A], tags[0x0128] = 6, 72.0, 2
    return tags


def mended(data: bytes) -> bytes:
    """A PNG with right checksums, so that what is in its chunks is believed."""
    data, at = bytearray(data), 8
    while data[1:4] == b"PNG" and at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            break
        data[at : at + 12 + size] = hostile.chunk(bytes(data[at + 4 : at + 8]), bytes(data[at + 8 : at + 8 + size]))
        at += 12 + size
    return bytes(data)


def main(count: int, seed: int, kept: Path, max_pixels: int) -> None:
    """Prints how many were decoded, how many refused, and by how many MB memory grew."""
    torch.set_num_threads(1)
    originals, decoded, refused = seeds(), 0, 0
    for data in originals:
        decode_image(data)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a hang ends the process
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        data = hostile.damaged(originals, seed * 1_000_000_007 + number)
        data = mended(data) if random.Random(number).random() < 0.7 else data
        kept.write_bytes(data)
        signal.alarm(LONGEST_S)
        try:
            shape = image_shape(data, max_pixels)
            pixels = decode_image(data, max_pixels)
            assert pixels.dtype == torch.uint8 and pixels.shape == (3, *shape) and pixels.numel() <= 3 * max_pixels
            decoded += 1
        except DataError as error:
            assert str(error).isprintable()
            refused += 1
    signal.alarm(0)
    kept.unlink()
    print(decoded, refused, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
