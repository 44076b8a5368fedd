"""Random numbers that are a pure function of (seed, epoch, sample, stream, j): no state, no torch, no I/O.

SplitMix64 (Steele, Lea, Flood 2014), used as a counter: the key is a hash of seed, epoch, stream and sample, and draw j
is output j of the SplitMix64 generator started there. Only integer arithmetic, so every machine gives the same bits.
"""

from __future__ import annotations

import numpy as np

GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's increment, the odd integer nearest 2^64 / golden ratio
WORD = 2**64 - 1


def uniforms(seed: int, epoch: int, samples: np.ndarray, n: int, stream: int = 0) -> np.ndarray:
    """Uniform float64 [len(samples), n] in [0, 1), row i a function of (seed, epoch, samples[i], stream) alone.

    Column j does not depend on n, so a longer row begins with the shorter one. `stream` tells apart independent uses
    of the same sample. All arguments are integers from 0 on, below 2^63.
    """
    key = _mix_int(_mix_int(_mix_int(seed + GAMMA) ^ (epoch + 1)) ^ (stream + 1))
    starts = _mix(np.uint64(key) ^ (np.asarray(samples).astype(np.uint64) * np.uint64(GAMMA)))
    return (splitmix64(starts, n) >> np.uint64(11)) * 2.0**-53  # the high 53 bits: every value is exact


def splitmix64(starts: np.ndarray, n: int) -> np.ndarray:
    """The first n outputs, uint64 [len(starts), n], of the SplitMix64 generators with these starting states."""
    counters = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GAMMA)
    return _mix(starts.astype(np.uint64)[:, None] + counters)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, a bijection on 64-bit words, over an array (which wraps at 2^64, as meant)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _mix_int(z: int) -> int:
    """The same finalizer over one Python integer, which is several times faster than an array of one."""
    z &= WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & WORD
    return z ^ (z >> 31)
