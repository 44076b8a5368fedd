"""Counter-based draws: the bits are SplitMix64's, uniform, uncorrelated, and depend on their own key alone."""

from __future__ import annotations

import numpy as np
import pytest

from dist_kd.data.draws import splitmix64, uniforms


def test_the_generator_is_splitmix64():
    # the published first outputs for seed 1234567 (the reference implementation of Steele, Lea and Flood)
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(np.array([1234567]), 5)[0].tolist() == published


def by_hand(seed: int, epoch: int, sample: int, n: int, stream: int) -> list[float]:
    """The same numbers by Python integers, of any size, reduced explicitly."""
    gamma, word = 0x9E3779B97F4A7C15, 2**64

    def mix(z):
        z %= word
        z = (z ^ (z // 2**30)) * 0xBF58476D1CE4E5B9 % word
        z = (z ^ (z // 2**27)) * 0x94D049BB133111EB % word
        return z ^ (z // 2**31)

    key = mix(mix(mix(seed + gamma) ^ (epoch + 1)) ^ (stream + 1))
    start = mix(key ^ (sample * gamma % word))
    return [mix(start + (j + 1) * gamma) // 2**11 / 2**53 for j in range(n)]


@pytest.mark.parametrize(("seed", "epoch", "stream"), [(0, 0, 0), (7, 3, 2), (2**31 - 1, 10_000, 34)])
def test_golden_values(seed, epoch, stream):
    samples = np.array([0, 1, 49_999, 2**40])
    expected = [by_hand(seed, epoch, int(sample), 4, stream) for sample in samples]
    assert uniforms(seed, epoch, samples, 4, stream).tolist() == expected


def test_the_bits_never_change():
    # written down once; another value means that every run since would see other views
    assert uniforms(1, 2, np.array([3]), 2, 4)[0].tolist() == [0.18199283769760444, 0.2520772985658113]


def test_rows_do_not_depend_on_their_neighbours_nor_columns_on_their_number():
    samples = np.array([5, 900, 31, 2])
    whole = uniforms(3, 1, samples, 8, 6)
    for row, sample in enumerate(samples):
        assert np.array_equal(uniforms(3, 1, np.array([sample]), 3, 6)[0], whole[row, :3])
    assert uniforms(3, 1, np.array([], dtype=np.int64), 4).shape == (0, 4)


def test_uniform():
    values = uniforms(0, 0, np.arange(200_000), 2, 1)
    assert values.min() >= 0 and values.max() < 1
    for column in values.T:
        counts = np.bincount((column * 256).astype(int), minlength=256)
        chi2 = ((counts - len(column) / 256) ** 2 / (len(column) / 256)).sum()
        assert 150 < chi2 < 370  # 255 degrees of freedom: mean 255, deviation 22.6


def test_neighbouring_keys_are_uncorrelated():
    n = 100_000
    samples = np.arange(n)
    base = uniforms(5, 5, samples, 3, 5)
    others = {
        "column": base[:, 1],
        "sample": np.roll(base[:, 0], 1),
        "epoch": uniforms(5, 6, samples, 1, 5)[:, 0],
        "seed": uniforms(6, 5, samples, 1, 5)[:, 0],
        "stream": uniforms(5, 5, samples, 1, 6)[:, 0],
        "seed and epoch swapped": uniforms(6, 4, samples, 1, 5)[:, 0],
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base[:, 0], other)[0, 1]) < 4.5 / n**0.5, name
