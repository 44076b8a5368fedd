"""Owns the structure of one tar: its files one after the other, or a refusal of whatever a reader could lose silently.

Python's and webdataset's readers take a bad header for the end of the archive, so a damaged shard would only seem
shorter. Here a shard is well only if it ends in its end-of-archive blocks with nothing behind them. Every byte is read
once and digested; memory is bounded, whatever the headers claim. Nothing is extracted. No torch.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, NoReturn

import xxhash

from dist_kd.errors import DataError, one_line

BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 20  # bytes read and digested at a time
MOST_MEMBERS = 8_000_000  # of one shard
MOST_NAME_BYTES = 4096
MOST_EXTENDED_BYTES = 1 << 20  # of the extended headers of one member: attributes and access lists may stand there too
FOREIGN_BEGINNINGS = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
EXTENDED = (*PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
RECORD = re.compile(rb"([0-9]{1,9}) ([^=]{1,255})=")  # the beginning of `LENGTH KEY=VALUE\n`
DIGITS = re.compile(rb"[0-9]{1,20}")
# Numbers as most writers write them, from `mode` to the checksum; tarfile's own look costs three times as much.
PLAIN = re.compile(rb"(?:[0-7]{6}[0-7 ][ \0]){3}(?:[0-7]{11}[ \0]){2}[0-7]{6}[ \0]{2}")
NUMBERS = re.compile(rb"(?:[0-7]{6}[0-7 ][ \0]|\0{8}){2}")  # of a device
REPAIR = "copy it again, or repack it"


class Member(NamedTuple):
    """A file in a tar."""

    name: str  # as it stands there: never a path to anything
    offset: int  # of its first byte
    size: int


class TarWalk:
    """A walk over the files of one open shard. DataError, naming the shard and the place, at the first damage."""

    def __init__(self, file: BinaryIO, size: int, shard: str):
        self.size, self.shard = size, shard
        self.sha256 = hashlib.sha256()  # of the shard, once the walk is over
        self.last = ""  # the name of the member before the next header
        self._file = file
        self._buffer, self._at, self._before = memoryview(b""), 0, 0  # bytes read, passed of those, read before them
        self._left = 0  # bytes of the current member's data and padding that are still to be passed

    @property
    def position(self) -> int:
        """Bytes passed."""
        return self._before + self._at

    def members(self) -> Iterator[Member]:
        """Regular files in order. `data` or `checksum` of one may be asked for until the next is."""
        for _ in range(MOST_MEMBERS + 1):
            header, name, size = self._next_member()
            if header is None:
                return
            if header.kind == tarfile.DIRTYPE or (
                header.kind == tarfile.AREGTYPE and _field(header, 0, 100).endswith(b"/")
            ):
                continue  # a folder has no data, whatever its size says
            if header.kind not in FILES:
                self.refuse(f"holds `{shown(name)}` as a link or special file, not its bytes; repack it with the files")
            self._begin(name, size)
            yield Member(name, self.position, size)
            self._pass(self._left)
            self.last = name
        self.refuse(f"has more than {MOST_MEMBERS} members, the most that are read; cut it into several shards")

    def data(self, member: Member) -> bytes:
        """The bytes of the current member: the caller has looked at its size."""
        self._left -= member.size
        return self._take(member.size)

    def checksum(self, member: Member) -> int:
        """The low 32 bits of xxh3_64 of the current member."""
        digest = xxhash.xxh3_64()
        self._left -= member.size
        self._pass(member.size, digest)
        return digest.intdigest() & 0xFFFFFFFF

    def refuse(self, what: str) -> NoReturn:
        raise DataError(f"shard `{self.shard}` {what}")

    def _next_member(self) -> tuple[_Header | None, str, int]:
        """(header, name, size) of the next member, with what extended headers say of it; no header at the end."""
        found: dict[str, bytes] = {}
        start, extended = self.position, False
        while (header := self._next_header()) is not None and header.kind in EXTENDED:
            records = self._extended(header)
            if any(found.get(key, value) != value for key, value in records.items()):
                self.refuse(f"has extended headers that contradict each other from byte {start} on; {REPAIR}")
            if self.position - start > MOST_EXTENDED_BYTES:
                self.refuse(
                    f"has extended headers of more than {MOST_EXTENDED_BYTES} bytes for one member, from byte {start} "
                    f"on; {REPAIR}"
                )
            found |= records
            extended = True
        if header is None:
            if extended:
                self.refuse(f"ends behind an extended header without its member at byte {start}; {REPAIR}")
            return None, "", 0
        name = found["path"].decode("utf-8", "surrogateescape") if "path" in found else _name(header)
        return header, name, int(found["size"]) if "size" in found else header.size

    def _extended(self, header: _Header) -> dict[str, bytes]:
        """`path` and `size` as an extended header gives them."""
        start = self.position - BLOCK
        self._begin(_name(header), header.size)
        if header.size > MOST_EXTENDED_BYTES:
            self.refuse(
                f"has an extended header of {header.size} bytes at byte {start}, above the {MOST_EXTENDED_BYTES} that "
                f"are read; {REPAIR}"
            )
        block = self._take(self._left)
        if header.kind == tarfile.GNUTYPE_LONGLINK:
            return {}
        if header.kind in PAX:
            found = self._records(block[: header.size], start)
        else:
            found = {"path": block.split(b"\0", 1)[0]}
            if len(found["path"]) > header.size:  # some readers take the name to the size, some to the first zero
                self.refuse(f"has a name that is cut in the extended header at byte {start}; {REPAIR}")
        if header.kind == tarfile.XGLTYPE and found:
            self.refuse(f"sets {' and '.join(found)} for all members at byte {start}; {REPAIR}")
        if not 0 < len(found.get("path", b"?")) <= MOST_NAME_BYTES:
            self.refuse(
                f"has a name of {len(found['path'])} bytes at byte {start}, but 1 to {MOST_NAME_BYTES} are read; "
                f"{REPAIR}"
            )
        return found

    def _records(self, block: bytes, start: int) -> dict[str, bytes]:
        """`path` and `size` of an extended header."""
        records, at, end = {}, 0, len(block.rstrip(b"\0"))
        while at < end:
            match = RECORD.match(block, at)
            behind = at + int(match.group(1)) if match else 0
            if not match or not match.end() < behind <= len(block) or block[behind - 1] != 0x0A:
                self.refuse(f"has a damaged extended header at byte {start}; {REPAIR}")
            key, value = match.group(2), block[match.end() : behind - 1]
            if key.startswith(b"GNU.sparse."):
                self.refuse(f"holds a sparse file, described at byte {start}; repack it with the files")
            if key == b"size" and not DIGITS.fullmatch(value):
                self.refuse(f"has a damaged size `{shown(value)}` in the extended header at byte {start}; {REPAIR}")
            if key in (b"path", b"size"):
                records[key.decode()] = value
            at = behind
        return records

    def _next_header(self) -> _Header | None:
        """None after a complete end of archive."""
        start = self.position
        block = self._take(BLOCK, short=True)
        if not block:
            if start == 0:
                self.refuse("is empty; copy it again")
            self.refuse(f"ends at byte {start} without the end-of-archive blocks: it was cut; copy it again")
        if len(block) < BLOCK:
            self._check_beginning(block, start)
            self.refuse(f"ends inside the header at byte {start}: it was cut; copy it again")
        if not any(block):
            self._end_of_archive(start)
            return None
        try:
            return _header(block)
        except (tarfile.HeaderError, ValueError):
            self._check_beginning(block, start)
            self.refuse(f"has a damaged header at byte {start}, {self._behind()}; {REPAIR}")

    def _check_beginning(self, block: bytes, start: int) -> None:
        if start == 0:
            packed = next((kind for magic, kind in FOREIGN_BEGINNINGS.items() if block.startswith(magic)), None)
            if packed:
                self.refuse(f"is compressed ({packed}), but samples are read by their place: uncompress it first")
            self.refuse(f"is not a tar: it begins with `{shown(block[:16])}`; copy it again")

    def _end_of_archive(self, start: int) -> None:
        while True:
            rest = self._buffer[self._at :].tobytes()
            if rest.count(0) != len(rest):
                self.refuse(
                    f"seems to end at byte {start} ({self._behind()}), but more follows: a zeroed header, or a "
                    "second archive appended; repack it"
                )
            self._at = len(self._buffer)
            if not self._fill():
                break
        if self.position < start + 2 * BLOCK:
            self.refuse(f"is cut inside its end-of-archive blocks at byte {start}; copy it again")

    def _begin(self, name: str, size: int) -> None:
        """The data of a member comes next."""
        self._left = -(-size // BLOCK) * BLOCK
        if size < 0 or self.position + self._left > self.size:
            self.refuse(
                f"ends at byte {self.size} inside `{shown(name)}` ({size} bytes from {self.position} on): it was cut, "
                "or that header is damaged; copy it again"
            )

    def _behind(self) -> str:
        return f"behind `{shown(self.last)}`" if self.last else "behind no member"

    # bytes

    def _take(self, size: int, *, short: bool = False) -> bytes:
        """The next `size` bytes; fewer only if they may be `short`."""
        end = self._at + size
        if end <= len(self._buffer):
            taken = self._buffer[self._at : end].tobytes()
            self._at = end
            return taken
        taken = bytearray()
        while len(taken) < size:
            piece = self._buffer[self._at : self._at + size - len(taken)]
            taken += piece
            self._at += len(piece)
            if len(taken) < size and not self._fill():
                if short:
                    break
                self._became_shorter()
        return bytes(taken)

    def _pass(self, size: int, digest: xxhash.xxh3_64 | None = None) -> None:
        """Goes on by `size` bytes."""
        while size:
            piece = self._buffer[self._at : self._at + size]
            if digest is not None:
                digest.update(piece)
            self._at += len(piece)
            size -= len(piece)
            if size and not self._fill():
                self._became_shorter()

    def _fill(self) -> bool:
        """Reads the next chunk, now that the one before has been passed; False at the end of the file."""
        self._before += len(self._buffer)
        chunk = self._file.read(CHUNK)
        self.sha256.update(chunk)
        self._buffer, self._at = memoryview(chunk), 0
        return bool(chunk)

    def _became_shorter(self) -> NoReturn:
        self.refuse(f"became shorter while it was read, at byte {self.position}; let its writer finish")


class _Header(NamedTuple):
    block: bytes
    kind: bytes
    size: int


def _header(block: bytes) -> _Header:
    """HeaderError or ValueError if the checksum is another, or a field is no number, as tarfile says it."""
    plain = PLAIN.match(block, 100) and NUMBERS.match(block, 329)
    if plain and int(block[148:154], 8) == sum(block) - sum(block[148:156]) + 256:
        return _Header(block, block[156:157], int(block[124:135], 8))
    return _Header(block, block[156:157], tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size)


def _field(header: _Header, first: int, end: int) -> bytes:
    return header.block[first:end].split(b"\0", 1)[0]


def _name(header: _Header) -> str:
    name = _field(header, 0, 100)
    prefix = b"" if header.kind in tarfile.GNU_TYPES else _field(header, 345, 500)
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def shown(text: str | bytes, most: int = 160) -> str:
    """Foreign text for a message: one printable line of at most about `most` characters."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    return one_line(text if len(text) <= most else text[:most] + "...")
