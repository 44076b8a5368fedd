"""Owns shards of other machines on this node's disk: one download a node, resumed, verified, within a budget.

FOLDER/shards/
   SHA256.tar     a whole, verified shard; its mtime is its last use, to the minute
   KEY.part       one under way, locked by whoever fetches it; KEY is its SHA256 or, if no index states it, url-HASH
   KEY.json       of which object those bytes are, and the room they will take; for url-HASH also the SHA256 it became
   .room          locked for the moments in which room is made and promised

Names come from digests only. Locks are flock's: the kernel drops them when a process dies, however it dies.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from dist_kd.data.cache_files import (
    LOCK_WAIT_S,
    boot,
    disk_words,
    free_on,
    gb,
    locked,
    read_note,
    same_file,
    size_of,
    write_all,
    write_note,
)
from dist_kd.data.remote import Changed, Limits, Patience, Stream, TryAgain, check_url, open_stream, shown
from dist_kd.errors import DataError

log = logging.getLogger(__name__)

TOUCH_S = 60.0  # a shard's last use is noted at most this often
ROOM_STEP = 16 << 20  # room promised at a time to a shard of unknown size
LEFTOVER_S = 3600.0  # a part nobody has written for so long is not coming back
ANEW = "put the shard of the index there again, or index the shards anew"


def cache_folder() -> Path:
    """Where this node keeps what it fetched: DIST_KD_CACHE, or ~/.cache/dist_kd."""
    return Path(os.environ.get("DIST_KD_CACHE") or "~/.cache/dist_kd").expanduser()


@dataclass(frozen=True)
class ShardCache:
    """Shards by URL, as files of this node. Holds no state but the folder, so that it pickles."""

    folder: Path
    limit_bytes: int
    timeout_s: float  # for one shard: waiting for another process, all attempts, all bytes
    limits: Limits = field(default_factory=Limits)

    def open(self, url: str, size: int | None = None, sha256: str | None = None) -> int:
        """A read-only descriptor of the whole shard, fetched first if it is not here; the caller closes it.

        `size` and `sha256` are what the index states; a shard that is here under its digest is taken as verified, one
        without is asked for at its server again. The descriptor stays good when the shard is evicted. DataError says
        what went wrong; NotThere and Forbidden are told apart.
        """
        check_url(url)
        if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise DataError(
                f"the index states `{sha256}` for `{shown(url)}`, which is no sha256 in small hexadecimal digits"
            )
        if sha256 and (found := self._kept(sha256)) is not None:
            return found
        if size is not None:
            self._check_fits(url, size)
        return _Fetch(self, url, size, sha256).run()

    def clean(self, unused_s: float = LEFTOVER_S) -> int:
        """Bytes freed: parts that no process holds and none has written for `unused_s`, and notes of shards gone."""
        freed = 0
        if not os.access(self._shards, os.W_OK):  # none yet, or one that is only read
            return 0
        with disk_words(self.folder, "cleaning the cache"), self._room(time.monotonic() + self.timeout_s):
            for part in self._shards.glob("*.part"):
                with suppress(FileNotFoundError):
                    if time.time() - part.stat().st_mtime >= unused_s:
                        freed += self._drop_part(part)
            for note in self._shards.glob("*.json*"):
                kept = self._path(f"{read_note(note).get('sha256')}.tar")
                if not kept.exists() and not note.with_name(note.name.split(".")[0] + ".part").exists():
                    note.unlink(missing_ok=True)
        return freed

    @property
    def _shards(self) -> Path:
        return Path(self.folder) / "shards"

    def _path(self, name: str) -> Path:
        return self._shards / name

    def _kept(self, sha256: str) -> int | None:
        """A descriptor of a shard that is here. Needs no lock: a name ending in .tar is whole, and open is atomic."""
        try:
            found = os.open(self._path(f"{sha256}.tar"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise DataError(f"`{self._path(sha256)}.tar` cannot be opened: {error.strerror}; remove it") from None
        with suppress(OSError):  # of another user, or a file system that is read-only
            if time.time() - os.fstat(found).st_mtime > TOUCH_S:
                os.utime(found)
        return found

    # --- room

    @contextmanager
    def _room(self, deadline: float) -> Iterator[None]:
        with locked(self._path(".room"), deadline, "the cache is being cleared by another process"):
            yield

    def _check_fits(self, url: str, size: int) -> None:
        if size > self.limit_bytes:
            raise DataError(
                f"`{shown(url)}` has {gb(size)}, but the cache in `{self.folder}` may hold {gb(self.limit_bytes)}; "
                f"give at least `--cache-gb {size / 1e9 + 0.1:.1f}`"
            )

    def _make_room(self, url: str, key: str, size: int, note: dict, deadline: float) -> None:
        """Evict, least recently used first, until `size` bytes for `key` can be promised in its `note`.

        Waits for the downloads of others, which can be evicted when they are done.
        """
        self._check_fits(url, size)
        while True:
            with self._room(deadline):
                used, free = self._used(key), free_on(self._shards)
                have = size_of(self._path(f"{key}.part"))
                for path in self._evictable(key):
                    if used + size <= self.limit_bytes and size - have <= free:
                        break
                    if path.suffix == ".part":
                        self._drop_part(path)
                    else:
                        log.info("cache: no more room for %s, the least recently used", path.name)
                        path.unlink(missing_ok=True)
                    used, free = self._used(key), free_on(self._shards)
                if size - have > free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if used + size <= self.limit_bytes:
                    write_note(self._path(f"{key}.json"), note | {"room": size})
                    return
            if time.monotonic() > deadline:
                raise DataError(
                    f"`{shown(url)}` needs {gb(size)} of the cache in `{self.folder}`, but shards under way take "
                    f"{gb(used)} of its {gb(self.limit_bytes)}; give a larger `--cache-gb`"
                )
            time.sleep(4 * LOCK_WAIT_S)

    def _used(self, but: str) -> int:
        """Bytes here and promised, without those of one key."""
        used = sum(size_of(path) for path in self._shards.glob("*.tar"))
        for part in self._shards.glob("*.part"):
            if part.stem != but:
                used += max(size_of(part), int(read_note(part.with_suffix(".json")).get("room", 0)))
        return used

    def _evictable(self, key: str) -> list[Path]:
        """Shards and others' parts, least recently used first; a part that is locked will refuse."""
        found = []
        for path in (*self._shards.glob("*.part"), *self._shards.glob("*.tar")):
            with suppress(FileNotFoundError):
                found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found) if path.name != f"{key}.part"]

    def _drop_part(self, part: Path) -> int:
        """Bytes freed by removing a part nobody holds; 0 if somebody does."""
        try:
            held = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return 0
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not same_file(held, part):  # became a shard meanwhile; what has its name now is another's
                return 0
            size = os.fstat(held).st_size
            part.with_suffix(".json").unlink(missing_ok=True)
            part.unlink(missing_ok=True)
            return size
        except BlockingIOError:
            return 0
        finally:
            os.close(held)


class _Fetch:
    """One shard on its way: the part file, its digest so far, and which object its bytes are of."""

    def __init__(self, cache: ShardCache, url: str, size: int | None, sha256: str | None):
        self.cache, self.url, self.size, self.sha256 = cache, url, size, sha256
        self.key = sha256 or f"url-{hashlib.sha256(url.encode()).hexdigest()[:40]}"
        self.part, self.note_path = cache._path(f"{self.key}.part"), cache._path(f"{self.key}.json")
        self.deadline = time.monotonic() + cache.timeout_s
        self.held = -1  # descriptor of the part, locked
        self.length, self.digest = 0, hashlib.sha256()
        self.version, self.total = "", size

    def run(self) -> int:
        what = f"`{shown(self.url)}` is being fetched by another process of this node"
        with disk_words(self.cache.folder, f"fetching `{shown(self.url)}`", lambda: self.total):
            self.cache._shards.mkdir(parents=True, exist_ok=True)
            with locked(self.part, self.deadline, what) as self.held:
                try:
                    return self._run()
                except OSError:  # a full disk must not stay full
                    self._discard()
                    raise
                finally:
                    if same_file(self.held, self.part) and size_of(self.part) == 0:
                        self.part.unlink()
                        if "sha256" not in read_note(self.note_path):
                            self.note_path.unlink(missing_ok=True)

    def _run(self) -> int:
        if self.sha256 and (found := self.cache._kept(self.sha256)) is not None:
            return found  # another process was faster
        self._recall()
        began, kept = time.monotonic(), self.length
        if (found := self._receive_all()) is not None:
            return found
        if self.sha256 and self.digest.hexdigest() != self.sha256:
            wrong = self.digest.hexdigest()
            log.warning(
                "`%s` has sha256 %s, not the %s of its index; fetched once more", shown(self.url), wrong, self.sha256
            )
            self._restart()
            self._receive_all()
            if self.digest.hexdigest() != self.sha256:
                wrong = self.digest.hexdigest()
                self._discard()
                raise DataError(
                    f"`{shown(self.url)}` has sha256 {wrong}, fetched twice, but its index states {self.sha256}; {ANEW}"
                )
        took = time.monotonic() - began
        log.info(
            "fetched %s: %s in %.1f s%s", shown(self.url), gb(self.length), took, f", {gb(kept)} kept" if kept else ""
        )
        return self._keep()

    def _keep(self) -> int:
        """The part becomes a shard: on the disk first, then under its name."""
        os.fsync(self.held)
        found = os.open(self.part, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)  # before others may evict it
        try:
            os.utime(self.held)
            digest = self.digest.hexdigest()
            os.replace(self.part, self.cache._path(f"{digest}.tar"))
            if self.sha256:
                self.note_path.unlink(missing_ok=True)
            else:
                write_note(self.note_path, {"version": self.version, "total": self.length, "sha256": digest})
            folder = os.open(self.cache._shards, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
            return found
        except BaseException:
            os.close(found)
            raise

    def _recall(self) -> None:
        """Take up the bytes that a process which died, or gave up, left in the part."""
        note = read_note(self.note_path)
        self.version = str(note.get("version", ""))
        # without a digest to come, bytes from before a crash of the machine may be zeros
        sure = self.sha256 or (self.version and note.get("boot") == boot())
        if not sure or "sha256" in note:
            self._restart()
            return
        os.lseek(self.held, 0, os.SEEK_SET)
        while chunk := os.read(self.held, 1 << 20):
            self.digest.update(chunk)
            self.length += len(chunk)

    def _restart(self) -> None:
        os.ftruncate(self.held, 0)
        os.lseek(self.held, 0, os.SEEK_SET)
        self.length, self.digest, self.version = 0, hashlib.sha256(), ""

    def _discard(self) -> None:
        with suppress(OSError):
            os.ftruncate(self.held, 0)  # frees the bytes; the empty file goes with the lock

    def _receive_all(self) -> int | None:
        """All bytes, over as many attempts as it takes; a descriptor instead if what is here is still the same."""
        patience = Patience(self.cache.limits, self.deadline)
        furthest = self.length
        while self.size is None or self.length < self.size:
            try:
                if not self.sha256 and not self.version:
                    self._restart()  # nothing would tell whether the rest is of the same object
                with open_stream(self.url, self.length, self.version, self.cache.limits, self.deadline) as stream:
                    if (found := self._same(stream)) is not None:
                        return found
                    self._receive(stream)
                break
            except TryAgain as error:
                if isinstance(error, Changed):
                    self._restart()
                of = f" of {self.total}" if self.total is not None else ""
                patience.pause(error, self.length > furthest, f"; {self.length}{of} bytes came")
                furthest = max(furthest, self.length)
        return None

    def _same(self, stream: Stream) -> int | None:
        """What was kept of this URL earlier, if its server still says the same of it."""
        note = read_note(self.note_path)
        head = stream.head
        same = head.version and head.version == note.get("version") and head.total in (None, note.get("total"))
        return self.cache._kept(note["sha256"]) if same and "sha256" in note else None

    def _receive(self, stream: Stream) -> None:
        head = stream.head
        if head.total is not None and self.size is not None and head.total != self.size:
            raise DataError(f"`{shown(self.url)}` has {head.total} bytes, but its index states {self.size}; {ANEW}")
        if head.offset != self.length:
            self._restart()
        self.version = head.version
        total = self.size if self.size is not None else head.total
        room = self.total = total
        if room is None:
            room = min(self.length + ROOM_STEP, self.cache.limit_bytes)
        note = {"url": shown(self.url), "version": self.version, "total": total, "boot": boot()}
        self.cache._make_room(self.url, self.key, room, note, self.deadline)
        for chunk in stream:
            if total is not None and self.length + len(chunk) > total:
                self._restart()
                raise TryAgain(f"`{shown(self.url)}` sent more than its {total} bytes")
            if total is None and self.length + len(chunk) > room:
                room = max(min(room + ROOM_STEP, self.cache.limit_bytes), self.length + len(chunk))
                self.cache._make_room(self.url, self.key, room, note, self.deadline)
            write_all(self.held, chunk)
            self.digest.update(chunk)
            self.length += len(chunk)
        if total is not None and self.length < total:
            raise TryAgain(f"`{shown(self.url)}` ended after {self.length} of {total} bytes")
        if total is None and not self.sha256:
            log.warning(
                "`%s`: neither its server nor an index states its size; a cut is noticed only where the tar is read",
                shown(self.url),
            )
