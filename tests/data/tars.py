"""Tars for tests: made member by member or header by header, and damaged at places that tarfile names."""

import io
import tarfile
from pathlib import Path

from dist_kd.data.tar_scan import Scan, scan_shard

PAX, GLOBAL, LONG_NAME, LONG_LINK = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def tar_of(path: Path, members: list[tuple[str, bytes]], **how) -> Path:
    with tarfile.open(path, "w", **how) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def block_of(name: str, data: bytes = b"", kind: bytes = b"0", size: int | None = None) -> bytes:
    """A header with its data and padding, as no writer would make it if `kind` or `size` say so."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data) if size is None else size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def checked(block: bytes) -> bytes:
    """A header, and what follows it, with its checksum set right."""
    total = sum(block[:148]) + 8 * ord(" ") + sum(block[156:512])
    return block[:148] + b"%06o\0 " % total + block[156:]


def record(key: str, value: str) -> bytes:
    """A record of a pax header: its length counts itself."""
    body = f" {key}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


END = bytes(1024)


def header_at(data: bytes, number: int) -> int:
    """Offset of the number-th member's header."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()[number].offset


def data_at(data: bytes, number: int) -> int:
    """Offset of the number-th member's bytes."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()[number].offset_data


def ended(data: bytes) -> int:
    """Offset of the end-of-archive blocks."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# kind of damage -> (what becomes of a shard , whose members are two a sample, what the refusal says)
STRUCTURE = {
    "cut at a member's end": (lambda d: d[: header_at(d, 6)], r"ends at byte \d+ without the end-of-archive blocks"),
    "cut in a header": (lambda d: d[: header_at(d, 6) + 100], r"ends inside the header"),
    "cut in a member": (lambda d: d[: data_at(d, 7) + 100], r"inside `[^`]+` \(\d+ bytes"),
    "cut in the end": (lambda d: d[: ended(d) + 512], r"cut inside its end-of-archive blocks"),
    "no end": (lambda d: d[: ended(d)], r"without the end-of-archive blocks"),
    "bit in a name": (lambda d: flipped(d, header_at(d, 6) + 2), r"damaged header at byte \d+, behind `[^`]+`"),
    "bit in a size": (lambda d: flipped(d, header_at(d, 6) + 130), r"damaged header"),
    "header zeroed": (
        lambda d: d[: header_at(d, 6)] + bytes(512) + d[header_at(d, 6) + 512 :],
        r"seems to end at byte \d+ \(behind `[^`]+`\), but more follows",
    ),
    "zero blocks inside": (
        lambda d: d[: header_at(d, 6)] + bytes(2048) + d[header_at(d, 6) :],
        r"but more follows",
    ),
    "garbage inside": (lambda d: d[: header_at(d, 6)] + b"\x07" * 512 + d[header_at(d, 6) :], r"damaged header"),
    "two archives": (lambda d: d + d, r"second archive"),
    "empty": (lambda d: b"", r"is empty"),
    "a web page": (lambda d: b"<!DOCTYPE html>" + bytes(600), r"is not a tar: it begins with `<!DOCTYPE html>"),
    "a short web page": (lambda d: b"<!DOCTYPE html>", r"is not a tar"),
    "gzip": (lambda d: b"\x1f\x8b" + d[2:], r"is compressed \(gzip\)"),
    "no extension": (lambda d: d[: ended(d)] + block_of("b", b"x") + END, r"holds `b`, which has no extension"),
    "key again": (lambda d: d[: ended(d)] + d, r"second (label|image) for key `[^`]+`"),
    "a link": (lambda d: d[: ended(d)] + block_of("b.jpg", kind=tarfile.SYMTYPE) + END, r"holds `b.jpg` as a link"),
}


def scan(path: Path, num_classes: int | None = None) -> Scan:
    with open(path, "rb") as file:
        return scan_shard(file, str(path), path.name, num_classes)
