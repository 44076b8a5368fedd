"""Owns the way from a sample number to its bytes: tars read by offset, length and checksum looked at each time.

Knows nothing of images.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import OrderedDict

from dist_kd.data.index import Index, checksum
from dist_kd.errors import DataError

OPEN_SHARDS = 64  # file descriptors kept; the one opened first goes first
RETRY_WAITS = (0.5, 2.0)  # seconds before the second and third attempt of a read that failed
FINAL = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR)  # waiting does not cure these


class BadSample(DataError):
    """The content of one sample is damaged, and a loader may show another in its place. `damage` is its kind."""

    def __init__(self, message: str, damage: str):
        super().__init__(message)
        self.damage = damage

    def __reduce__(self):
        return BadSample, (str(self), self.damage)


class _File:
    """An open shard. It is closed when nobody reads from it any more: threads share a reader, which keeps only some."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self):
        os.close(self.descriptor)


class TarReader:
    """Bytes of samples. Opens shards when they are first needed, in each process for itself; pickles without them."""

    def __init__(self, index: Index):
        self.index = index
        self.retries = 0  # reads that failed and were tried again
        self._open: OrderedDict[int, _File] = OrderedDict()  # by shard number
        self._first_seen: dict[int, tuple] = {}  # shard number -> which file it was
        self._started = time.time_ns()
        self._opening = threading.Lock()  # the threads of memory.py share a reader

    def read(self, sample: int) -> bytes:
        """The image of a sample as it lies in its shard.

        BadSample if its checksum is wrong; DataError if the shard is missing, too short, replaced, or cannot be read.
        """
        shard = self.index.shard_of(sample)
        offset, length, _label, digest = self.index.rows.item(sample)  # by fields, it is a quarter of a small read
        data = self._read(shard, sample, offset, length)
        if checksum(data) != digest:
            if change := self._change(shard):
                raise DataError(
                    f"shard `{self.index.location(shard)}` was replaced: {change}, and sample {sample} has other bytes "
                    "than the index says; put the old shard back, or index the new one and start another run"
                )
            raise BadSample(
                f"{self.name(sample)} has other bytes than the index says (checksum); copy the shard again, then run "
                f"`dist-kd verify {self.index.url or self.index.folder}`",
                "checksum",
            )
        return data

    def name(self, sample: int) -> str:
        """How messages name a sample."""
        shard, _ = self.index.locate(sample)
        return f"sample {sample} of shard `{self.index.location(shard)}`"

    def close(self) -> None:
        self._open.clear()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": OrderedDict(), "_opening": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state | {"_opening": threading.Lock()})

    def _read(self, shard: int, sample: int, offset: int, length: int) -> bytes:
        for wait in (*RETRY_WAITS, None):
            try:
                file = self._file(shard)
                data = os.pread(file.descriptor, length, offset)
                while 0 < len(data) < length:  # the kernel may give less than asked, and does above 2 GiB
                    more = os.pread(file.descriptor, length - len(data), offset + len(data))
                    if not more:
                        break
                    data += more
                break
            except OSError as error:
                with self._opening:
                    self._open.pop(shard, None)  # a stale handle stays stale
                if wait is None or error.errno in FINAL:
                    raise DataError(
                        f"{self.name(sample)} cannot be read ({error.strerror}, after {len(RETRY_WAITS)} retries); "
                        "check the storage, then start the run again: it resumes"
                        if wait is None
                        else f"{self.name(sample)} cannot be read ({error.strerror}); put the shard back"
                    ) from None
                self.retries += 1
                time.sleep(wait)
        if len(data) < length:
            raise DataError(
                f"{self.name(sample)} should have {length} bytes from byte {offset} on, but the shard ends after "
                f"{len(data)} of them: it was cut or replaced; copy it again"
            )
        return data

    def _file(self, shard: int) -> _File:
        file = self._open.get(shard)
        if file is not None:
            return file
        with self._opening:
            return self._opened(shard)

    def _opened(self, shard: int) -> _File:
        if shard not in self._open:
            file = _File(self.index.open_shard(shard))
            now, indexed = os.fstat(file.descriptor), self.index.shards[shard].bytes
            if now.st_size != indexed and not self.index.url:
                raise DataError(
                    f"shard `{self.index.location(shard)}` has {now.st_size} bytes where the index says {indexed}: it "
                    "was cut, replaced or added to; copy it again, or index the shards anew"
                )
            self._first_seen.setdefault(shard, _identity(now))
            while len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)
            self._open[shard] = file
        return self._open[shard]

    def _change(self, shard: int) -> str:
        """How the file of a local shard is not the one it was when this reader began; "" if that cannot be seen.

        A shard on another machine was checked whole when it came.
        """
        if self.index.url:
            return ""
        now, indexed = os.fstat(self._file(shard).descriptor), self.index.shards[shard].bytes
        if now.st_size != indexed:
            return f"it has {now.st_size} bytes where the index says {indexed}"
        # another file under the same name, or the same one written to: since it was first opened, or since the start
        # (written in the future: this clock or that of the file system is wrong, and says nothing)
        written = max(now.st_mtime_ns, now.st_ctime_ns)
        if _identity(now) != self._first_seen[shard] or self._started < written <= time.time_ns():
            return "its file is another one, or was written to, since this run began"
        return ""


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
