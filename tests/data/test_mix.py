"""Mixup and cutmix: partners, exact shares, Beta's distribution, and no dependence on the micro-batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_kd.data.mix import Mix, beta, cut_boxes

torch.set_num_threads(1)


def batch(count: int, size: int = 16):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, size, size, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return images, labels, np.arange(1000, 1000 + count)


def partner(rows: torch.Tensor) -> torch.Tensor:
    """Rows 2j and 2j+1 exchanged, written out."""
    return rows[[i + 1 if i % 2 == 0 else i - 1 for i in range(len(rows))]]


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.99, 1.0, 1.5, 2.0, 4.0])
def test_lambda_is_beta_distributed(alpha):
    ours = beta(alpha, seed=3, epoch=1, samples=np.arange(100_000))
    theirs = np.random.default_rng(0).beta(alpha, alpha, 500_000)
    assert ours.min() >= 0 and ours.max() <= 1
    grid = np.sort(np.concatenate([ours, theirs]))
    cdf = [np.searchsorted(np.sort(values), grid, side="right") / len(values) for values in (ours, theirs)]
    assert np.abs(cdf[0] - cdf[1]).max() < 1.95 * (1 / 100_000 + 1 / 500_000) ** 0.5  # Kolmogorov-Smirnov, 0.1 %


def test_a_tiny_alpha_neither_underflows_nor_fails():
    values = beta(0.001, 0, 0, np.arange(2000))
    assert np.isfinite(values).all() and 0.4 < values.mean() < 0.6


def test_lambda_depends_on_its_own_sample_alone():
    samples = np.arange(5000)
    whole = beta(3.0, 1, 2, samples)  # among so many, some need more than the first 16 tries
    assert np.array_equal(whole[1234:1240], beta(3.0, 1, 2, samples[1234:1240]))
    assert not np.array_equal(whole, beta(3.0, 1, 3, samples))
    assert not np.array_equal(whole, beta(3.0, 2, 2, samples))


def test_mixup_by_hand():
    images, labels, samples = batch(8)
    mixed, soft = Mix(0.4, 0, seed=5, num_classes=10)(images, labels, 2, samples)
    share = torch.from_numpy(beta(0.4, 5, 2, samples)).float()
    own, other = torch.nn.functional.one_hot(labels, 10), torch.nn.functional.one_hot(partner(labels), 10)
    by_image = share[:, None, None, None]
    torch.testing.assert_close(mixed, by_image * images + (1 - by_image) * partner(images))
    torch.testing.assert_close(soft, share[:, None] * own + (1 - share[:, None]) * other)
    assert soft.dtype == torch.float32 and mixed.dtype == images.dtype


def test_cutmix_shares_are_counted_pixels():
    count = 400
    rows = torch.arange(count, dtype=torch.float32)
    images = rows[:, None, None, None].expand(count, 3, 12, 20).contiguous()
    labels = torch.arange(count) % 10  # partners never share a class
    mixed, soft = Mix(0, 1.0, seed=5, num_classes=10)(images, labels, 0, np.arange(count))
    mine = (mixed == images).float().mean((1, 2, 3))
    assert torch.equal((mixed == images) | (mixed == partner(images)), torch.ones_like(images, dtype=torch.bool))
    assert torch.allclose(soft.gather(1, labels[:, None])[:, 0], mine, atol=1e-6)
    assert torch.allclose(soft.gather(1, partner(labels)[:, None])[:, 0], 1 - mine, atol=1e-6)
    assert 0.55 < mine.mean() < 0.75  # 1 - area is lambda (mean .5), and boxes are cut at the border
    different = (mixed != images)[:, 0]
    for found in different[different.flatten(1).any(1)]:  # each a full rectangle
        rows, columns = found.any(1), found.any(0)
        assert found.sum() == rows.sum() * columns.sum()


def test_boxes_by_hand():
    # lambda .75: half sides are a quarter of 16 and of 32; the second centre is cut at the top left corner
    boxes = cut_boxes(np.array([0.75, 0.75, 1.0]), np.array([[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]]), 16, 32)
    assert boxes.tolist() == [[4, 12, 8, 24], [0, 4, 0, 8], [8, 8, 16, 16]]


def test_with_both_each_row_takes_one():
    images, labels, samples = batch(2000, 8)
    share, boxes = Mix(0.8, 1.0, 0, 10).plan(0, samples, 8, 8)
    cut = boxes[:, 1] > boxes[:, 0]
    assert 850 < cut.sum() < 1050  # half, less the empty boxes
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    assert np.array_equal(share[cut], 1 - area[cut] / 64)
    mixed, soft = Mix(0.8, 1.0, 0, 10)(images, labels, 0, samples)
    chosen = torch.from_numpy(cut)
    untouched = ((mixed == images) | (mixed == partner(images))).flatten(1).all(1)
    assert untouched[chosen].all() and not untouched[~chosen].all()
    torch.testing.assert_close(soft.sum(1), torch.ones(2000))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0), (0, 1.0), (0.8, 1.0)])
def test_a_micro_batch_is_a_part_of_the_batch(mixup, cutmix):
    images, labels, samples = batch(12)
    mix = Mix(mixup, cutmix, 1, 10)
    whole = mix(images, labels, 3, samples)
    part = mix(images[4:10], labels[4:10], 3, samples[4:10])
    assert torch.equal(part[0], whole[0][4:10]) and torch.equal(part[1], whole[1][4:10])
    assert not torch.equal(mix(images, labels, 4, samples)[0], whole[0])


def test_nothing_asked_changes_nothing():
    images, labels, samples = batch(4)
    mixed, soft = Mix(0, 0, 0, 10)(images, labels, 0, samples)
    assert torch.equal(mixed, images) and torch.equal(soft, torch.nn.functional.one_hot(labels, 10).float())
