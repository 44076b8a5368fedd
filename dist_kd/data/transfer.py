"""Owns one transfer from another machine: its limits, its thread, what can go wrong, and when it is begun again.

Each transfer runs in a thread of its own, so that a wait which nothing else bounds (a name server, a store's library)
is bounded here.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from dist_kd.data.remote_urls import shown
from dist_kd.errors import DataError

log = logging.getLogger(__name__)

WAITING_CHUNKS = 4  # between the thread that receives and the one that writes
MAY_PASS = (408, 425, 429)  # of the 4xx; all 5xx may pass
REMEDY = "see to that server, or copy the data here; then the same command goes on"
ADVICE = {
    401: "it wants credentials: ~/.netrc for http(s), the store's environment variables otherwise",
    403: "the credentials given (~/.netrc, or the store's environment variables) do not allow it, or there are none",
    404: "check the URL",
    410: "check the URL",
}


class NotThere(DataError):
    """Nothing lies under that URL."""


class Forbidden(DataError):
    """What lies there, if anything, is not for these credentials. Some stores say so of what does not exist."""


class TryAgain(DataError):
    """Trouble that may pass. `pause_s`: how long the server asked to be left alone."""

    def __init__(self, message: str, pause_s: float = 0.0):
        super().__init__(message)
        self.pause_s = pause_s


class Changed(TryAgain):
    """The object is no longer the one whose first bytes were kept: begin at its first byte."""


@dataclass(frozen=True)
class Limits:
    """How long one transfer may wait for what, and how often it is begun again."""

    connect_s: float = 10.0
    idle_s: float = 30.0  # longest silence of a connection
    attempts: int = 10  # failures in a row without a new byte, about two minutes of pauses
    pause_s: float = 0.5  # before the second attempt; doubles up to the longest
    longest_pause_s: float = 30.0

    @property
    def backstop_s(self) -> float:
        """Longest wait for one answer of any library, whatever it does inside."""
        return self.connect_s + 4 * self.idle_s


LIMITS = Limits()


class Head(NamedTuple):
    """What is known of an object when its bytes begin."""

    total: int | None  # bytes of the whole object
    offset: int  # where the bytes that follow begin: as asked, or 0 if the whole comes again
    version: str  # strong ETag or date, "" if the server tells none


class Stream:
    """The bytes of an object from `head.offset` on, in chunks. A context manager; iterate once."""

    def __init__(self, source: Iterator[Head | bytes], url: str, limits: Limits, deadline: float):
        self._url, self._limits, self._deadline = url, limits, deadline
        self._queue: queue.Queue = queue.Queue(WAITING_CHUNKS)
        self._closed, self._wanted = threading.Event(), threading.Event()
        threading.Thread(target=self._receive, args=(source,), daemon=True, name="dist_kd-remote").start()
        try:
            self.head: Head = self._take()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        self._wanted.set()

    def __iter__(self) -> Iterator[bytes]:
        self._wanted.set()
        while (chunk := self._take()) is not None:
            yield chunk

    def _take(self) -> Any:
        rest = self._deadline - time.monotonic()
        try:
            if rest <= 0:  # also while bytes still come
                raise queue.Empty
            item = self._queue.get(timeout=min(self._limits.backstop_s, rest))
        except queue.Empty:
            late = "did not come in time" if rest < self._limits.backstop_s else "fell silent"
            raise TryAgain(f"`{shown(self._url)}` {late}") from None
        if isinstance(item, BaseException):
            raise item
        return item

    def _receive(self, source: Iterator[Head | bytes]) -> None:
        try:
            for item in source:
                if not self._put(item) or not self._asked_for_more():
                    source.close()
                    return
            self._put(None)
        except BaseException as error:  # belongs to whoever reads the stream
            self._put(error)

    def _asked_for_more(self) -> bool:
        """After the head: whoever finds there what the disk already has closes the stream, and no byte is fetched."""
        self._wanted.wait()
        return not self._closed.is_set()

    def _put(self, item: object) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False


class Patience:
    """Pauses between attempts: exponential with jitter, and an end."""

    def __init__(self, limits: Limits, deadline: float):
        self._limits, self._deadline = limits, deadline
        self._began, self._failures = time.monotonic(), 0

    def pause(self, error: TryAgain, moved: bool = False, have: str = "") -> None:
        """Wait before the next attempt, or raise DataError.

        `moved`: new bytes had come, so the count of failures begins again. `have`: what there is so far, in words.
        """
        self._failures = 1 if moved else self._failures + 1
        limits, now = self._limits, time.monotonic()
        doubled = limits.pause_s * 2.0 ** min(self._failures - 1, 99)
        pause = min(doubled, limits.longest_pause_s) * random.uniform(0.5, 1.0)
        pause = max(pause, min(error.pause_s, limits.longest_pause_s))
        spent = f"after {self._failures} attempts without a new byte, {now - self._began:.1f} s in all{have}"
        if self._failures >= limits.attempts:
            raise DataError(f"{error}; gave up {spent}; {REMEDY}") from error
        if now + pause >= self._deadline:
            raise DataError(f"{error}; gave up at its time limit, {spent}; {REMEDY}") from error
        log.warning("%s; attempt %d in %.1f s", error, self._failures + 1, pause)
        time.sleep(pause)


def raise_status(url: str, status: int, reason: str, retry_after: str = "") -> None:
    """The error for an HTTP status that is no success."""
    said = f"`{shown(url)}` answered {status} {reason}".rstrip()
    if status >= 500 or status in MAY_PASS:
        raise TryAgain(said, float(retry_after) if retry_after.isdecimal() else 0.0)
    kind = NotThere if status in (404, 410) else Forbidden if status in (401, 403) else DataError
    raise kind(f"{said}; {ADVICE.get(status, 'this does not pass by waiting, so it was not tried again')}")
