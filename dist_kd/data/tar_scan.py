"""Owns the structure of one shard: a walk over its tar headers that refuses whatever a reader could lose silently.

Python's and webdataset's readers take a bad header for the end of the archive, so a damaged shard would only seem
shorter. Here a shard is well only if it ends in its end-of-archive blocks with nothing behind them. No torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import xxhash

from dist_kd.errors import DataError

# One row of the index, 20 bytes: where the image of a sample lies in its shard, its label, its checksum.
ROW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<i4"), ("checksum", "<u4")])
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # webdataset's rule: split at the basename's first dot
SKIPPED = re.compile(r"(?:.*/)?(?:\._[^/]*|\.DS_Store)|__[^/]*__(?:/.*)?")  # macOS and webdataset leave these in tars
BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 22  # bytes
LARGEST_LABEL = 2**31 - 1
FOREIGN_BEGINNINGS = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class ShardInfo:
    """One shard. `name` is its path relative to the index's folder, or an absolute one."""

    name: str
    bytes: int
    sha256: str
    samples: int


def checksum(image: bytes) -> int:
    """The low 32 bits of xxh3_64 of an image's bytes."""
    return xxhash.xxh3_64_intdigest(image) & 0xFFFFFFFF


def scan_shard(path: Path, name: str, num_classes: int | None = None) -> tuple[ShardInfo, np.ndarray]:
    """What is in a shard, and its rows [samples] in the order of the tar; reads every byte once.

    Without `num_classes` labels are only required to be 0 or more. DataError at the first damage.
    """
    try:
        with open(path, "rb") as file:
            walk = _Walk(file, path.stat().st_size, str(path), num_classes)
            rows = walk.rows()
    except OSError as error:
        raise DataError(f"shard `{path}` cannot be read ({error.strerror}); check its path and permissions") from None
    return ShardInfo(name, walk.position, walk.sha256.hexdigest(), len(rows)), rows


class _Sample:
    image: tuple[int, int, int] | None = None  # offset, length, checksum
    label: int | None = None  # of KEY.cls
    json_label: int | None = None  # of KEY.json, used where there is no KEY.cls


class _Walk:
    """A walk over one open shard."""

    def __init__(self, file, size: int, shard: str, num_classes: int | None):
        self.file, self.size, self.shard, self.num_classes = file, size, shard, num_classes
        self.position = 0  # bytes read
        self.sha256 = hashlib.sha256()
        self.samples: dict[str, _Sample] = {}  # by key, in the order of the tar

    def rows(self) -> np.ndarray:
        self._members()
        rows = np.empty(len(self.samples), ROW)
        for row, (key, sample) in enumerate(self.samples.items()):
            if sample.image is None:
                kinds = ", ".join("." + kind for kind in IMAGE_TYPES)
                self._refuse(
                    f"has no image for key `{key}`; each sample needs KEY and one of {kinds}, and a key ends at the "
                    "first dot of the file's name"
                )
            label = sample.json_label if sample.label is None else sample.label
            if label is None:
                self._refuse(f"has no label for key `{key}`; each sample needs KEY.cls, or KEY.json with `label`")
            rows[row] = (*sample.image[:2], label, sample.image[2])
        return rows

    def _members(self) -> None:
        name, size = None, None  # from extended headers, for the next member
        while True:
            start = self.position
            header = self._header()
            if header is None:
                return
            if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                block = self._data(header.size, header.name)
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    name = block.rstrip(b"\0").decode("utf-8", "surrogateescape")
                else:
                    records = self._pax_records(block, start)
                    name, size = records.get("path", name), int(records.get("size", size or 0)) or None
                continue
            if header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                self._data(header.size, header.name)
                continue
            self._member(header, name or header.name, header.size if size is None else size)
            name, size = None, None

    def _header(self) -> tarfile.TarInfo | None:
        """The next header; None after a complete end of archive."""
        start = self.position
        block = self._read(BLOCK)
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:
            self._end_of_archive(start)
            return None
        except tarfile.EmptyHeaderError:
            if start == 0:
                self._refuse("is empty; copy it again")
            self._refuse(f"ends at byte {start} without the end-of-archive blocks: it was cut; copy it again")
        except tarfile.TruncatedHeaderError:
            self._no_tar(block, start)
            self._refuse(f"ends inside the header at byte {start}: it was cut; copy it again")
        except (tarfile.HeaderError, ValueError):
            self._no_tar(block, start)
            self._refuse(f"has a damaged header at byte {start}, behind {self._last()}; copy it again, or repack it")

    def _no_tar(self, block: bytes, start: int) -> None:
        if start == 0:
            packed = next((kind for magic, kind in FOREIGN_BEGINNINGS.items() if block.startswith(magic)), None)
            if packed:
                self._refuse(f"is compressed ({packed}), but samples are read by their place: uncompress it first")
            self._refuse(f"is not a tar: it begins with `{ascii(block[:16])[2:-1]}`; copy it again")

    def _end_of_archive(self, start: int) -> None:
        zeros = BLOCK
        while chunk := self._read(CHUNK):
            if chunk.count(0) != len(chunk):
                self._refuse(
                    f"seems to end at byte {start} (behind {self._last()}), but more follows: a zeroed header, or a "
                    "second archive appended; repack it"
                )
            zeros += len(chunk)
        if zeros < 2 * BLOCK:
            self._refuse(f"is cut inside its end-of-archive blocks at byte {start}; copy it again")

    def _member(self, header: tarfile.TarInfo, name: str, size: int) -> None:
        match = KEY_AND_EXTENSION.fullmatch(name)
        if header.type not in tarfile.REGULAR_TYPES or header.type == tarfile.GNUTYPE_SPARSE:
            if header.type != tarfile.DIRTYPE and match:
                self._refuse(f"holds `{name}` as a link or special file, not its bytes; repack it with the files")
            if header.type not in tarfile.SUPPORTED_TYPES:
                self._data(size, name, keep=False)
            return  # links and folders have no data, whatever size says
        if SKIPPED.fullmatch(name):
            self._data(size, name, keep=False)
            return
        if match is None:
            self._refuse(f"holds `{name}`, which has no extension, so it belongs to no sample; rename or remove it")
        key, extension = match.group(1), match.group(2).lower()
        sample = self.samples.setdefault(key, _Sample())
        if extension in IMAGE_TYPES:
            if sample.image is not None:
                self._refuse(f"holds a second image for key `{key}`, `{name}`; keys must be unique in a shard")
            if not 0 < size < 2**32:
                self._refuse(f"holds `{name}` of {size} bytes; an image has 1 byte to 4 GiB")
            offset = self.position
            sample.image = (offset, size, self._data(size, name, keep=False))
        elif extension == "cls":
            if sample.label is not None:
                self._refuse(f"holds a second label for key `{key}`, `{name}`; keys must be unique in a shard")
            sample.label = self._label(self._data(size, name), name)
        elif extension == "json":
            sample.json_label = self._json_label(self._data(size, name), name)
        else:
            self._data(size, name, keep=False)

    def _label(self, text: bytes, name: str) -> int:
        text = text.strip()
        if not re.fullmatch(rb"-?[0-9]{1,19}", text):
            self._refuse(f"holds `{name}` with label `{ascii(text[:40])[2:-1]}`, which is not an integer")
        label, limit = int(text), self.num_classes
        if not 0 <= label < (LARGEST_LABEL + 1 if limit is None else limit):
            rule = "at least 0" if limit is None else f"one of 0..{limit - 1}, as there are {limit} classes"
            self._refuse(f"holds `{name}` with label `{label}`, which must be {rule}")
        return label

    def _json_label(self, text: bytes, name: str) -> int | None:
        """The member's `label`; None if it has none, then a .cls is expected."""
        try:
            value = json.loads(text)
        except ValueError:
            self._refuse(f"holds `{name}`, which is not JSON")
        label = value.get("label") if isinstance(value, dict) else None
        return None if label is None else self._label(str(label).encode(), name)

    def _pax_records(self, block: bytes, start: int) -> dict[str, str]:
        """Records `LENGTH KEY=VALUE\\n` of an extended header."""
        records, rest = {}, block
        while rest.strip(b"\0"):
            match = re.match(rb"([0-9]{1,9}) ([^=]+)=", rest)
            length = int(match.group(1)) if match else 0
            if not match or not match.end() < length <= len(rest) or rest[length - 1 : length] != b"\n":
                self._refuse(f"has a damaged extended header at byte {start}; copy it again, or repack it")
            value = rest[match.end() : length - 1].decode("utf-8", "surrogateescape")
            records[match.group(2).decode("utf-8", "replace")] = value
            rest = rest[length:]
        if not records.get("size", "0").isdigit():
            self._refuse(f"has a damaged extended header at byte {start}; copy it again, or repack it")
        return records

    def _data(self, size: int, name: str, *, keep: bool = True):
        """The next `size` bytes if they are to be kept, else their checksum; the padding to a block is passed over."""
        padded = -(-size // BLOCK) * BLOCK
        if size < 0 or self.position + padded > self.size:
            self._refuse(
                f"ends at byte {self.size} inside `{name}` ({size} bytes from {self.position} on): it was cut, or "
                "that header is damaged; copy it again"
            )
        if keep and size > CHUNK:
            self._refuse(f"holds `{name}` of {size} bytes, too long for a label or a name")
        parts, digest, left = [], xxhash.xxh3_64(), size
        while left:
            chunk = self._read(min(left, CHUNK))
            if not chunk:
                self._refuse(f"became shorter while it was read, inside `{name}`; let its writer finish")
            left -= len(chunk)
            digest.update(chunk)
            if keep:
                parts.append(chunk)
        self._read(padded - size)
        return b"".join(parts) if keep else digest.intdigest() & 0xFFFFFFFF

    def _read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.position += len(block)
        self.sha256.update(block)
        return block

    def _last(self) -> str:
        return f"key `{next(reversed(self.samples))}`" if self.samples else "no sample"

    def _refuse(self, what: str) -> NoReturn:
        raise DataError(f"shard `{self.shard}` {what}")
