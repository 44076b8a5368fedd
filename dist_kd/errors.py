"""Every error a user can cause: one sentence with the value, the rule, where it came from and what to do.

DistKDError
  ConfigError       raised wherever a setting is looked at: it cannot work (exit 2)
  DataError         raised by data: shards, index or images that are not what they should be (exit 3)
  CheckpointError   raised by checkpoint: nothing usable to resume from, or another run's files (exit 4)
  DivergedError     raised by loop and updates: the loss or the gradients are no longer finite (exit 5)
  SaveError         raised by checkpoint: the disk takes no checkpoint, or no other file of the run (exit 6)
  OutOfMemoryError  raised by out_of_memory: of the device or the host (exit 9)
  HungError         said by watchdog: nothing moved for longer than it may (exit 7)
  LostError         raised by first_failure: another rank ended, which ends this one (exit 8)
"""

import re

# torch's allocators (device, host), numpy's, cuBLAS's, the kernel's; the last where an error could not travel as it was
MEMORY = re.compile(
    r"out of memory|DefaultCPUAllocator|[Uu]nable to allocate|CUBLAS_STATUS_ALLOC_FAILED|[Cc]annot allocate memory|"
    r"MemoryError|could not create a primitive$"  # the last is how oneDNN says it
)
LONGEST_MESSAGE = 1500  # characters; a path may have 4096
MOST_LINES = 40  # problems told of at once


class DistKDError(Exception):
    """Base of all errors shown to the user without a traceback: a sentence, or one for each problem found.

    Each is `one_line`: it may name what somebody else chose, a file or a tensor, and ends up on a terminal.
    """

    exit_code = 1
    kind = "error"
    alike = False  # True where every rank raises the same: then one of them says it

    def __init__(self, *sentences: str):
        more = [f"and {len(sentences) - MOST_LINES} more problems"] if len(sentences) > MOST_LINES + 1 else []
        shown = sentences[:MOST_LINES] if more else sentences
        super().__init__(*map(one_line, shown), *more)  # all of its args: it comes whole out of a pickle

    def __str__(self) -> str:
        return "\n".join(self.args)


class ConfigError(DistKDError):
    """A setting, or a combination of settings, that cannot work."""

    exit_code = 2
    kind = "config"


class DataError(DistKDError):
    """Shards, an index or an image that are not what they should be."""

    exit_code = 3
    kind = "data"


class CheckpointError(DistKDError):
    """No usable checkpoint where one was asked for, or one that belongs to another run."""

    exit_code = 4
    kind = "checkpoint"


class DivergedError(DistKDError):
    """The loss or the gradients are no longer finite."""

    exit_code = 5
    kind = "diverged"


class SaveError(DistKDError):
    """The disk refuses what must be written: full, over quota, read-only or not ours. What stood before stands."""

    exit_code = 6
    kind = "save"


class HungError(DistKDError):
    """Nothing moved for longer than it may. Never raised: the main thread hangs, and the watchdog ends the process."""

    exit_code = 7
    kind = "hung"


class LostError(DistKDError):
    """Another rank failed or died: what ended this one is only that its connection broke."""

    exit_code = 8
    kind = "lost"


class OutOfMemoryError(DistKDError):
    """The device or the host has not enough memory for this batch or these networks."""

    exit_code = 9
    kind = "memory"


def says_memory_ran_out(error: BaseException) -> bool:
    """Whether an error is no fault of what was read or computed: there was not enough memory for it."""
    return isinstance(error, MemoryError) or bool(MEMORY.search(str(error)))


def printable(line: str) -> str:
    """The line with escapes for whatever a terminal would obey or not show. All that is said goes through here."""
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def one_line(message: str) -> str:
    """The message as one printable line, the middle of a very long one left out."""
    line = printable(message)
    return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 400]} [...] {line[-400:]}"
