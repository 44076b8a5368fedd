"""Mixup and cutmix between the rows 2j and 2j+1 of a batch, keyed per sample; images stay on their device.

Partners are neighbours in the global batch, so a pair never depends on the micro-batch or the number of ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dist_kd.data.draws import uniforms

LAMBDA_STREAM, BOX_STREAM, COIN_STREAM = 32, 33, 34  # of draws.uniforms; views.AUGMENTS has the numbers below 32


class Mix:
    """Mixup with Beta(mixup, mixup), cutmix with Beta(cutmix, cutmix), or a fair coin per row between the two.

    0 turns one off; alphas are in (0, 4]. Each row keeps a share lambda of itself and takes the rest from its partner.
    """

    def __init__(self, mixup: float, cutmix: float, seed: int, num_classes: int):
        assert 0 <= mixup <= 4 and 0 <= cutmix <= 4, "Config bounds both alphas"
        self.mixup, self.cutmix, self.seed, self.num_classes = mixup, cutmix, seed, num_classes

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mixed images [B, 3, H, W] and soft labels float32 [B, C], from float images and int64 labels [B]; B even."""
        batch, _, height, width = images.shape
        assert batch % 2 == 0, "the plan cuts batches at even rows"
        share, boxes = self.plan(epoch, samples, height, width)
        is_cut = boxes[:, 1] > boxes[:, 0]
        blend = np.where(is_cut, 1.0, share)  # a cut row keeps its pixels outside the box as they are
        table = torch.from_numpy(np.column_stack([share, blend, boxes]).astype(np.float32))
        table = table.to(images.device, non_blocking=True)  # the only copy: [B, 6], small integers are exact

        partners = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        if self.mixup:
            weight = table[:, 1, None, None, None].to(images.dtype)
            images = torch.lerp(partners, images, weight)
        if self.cutmix:
            top, bottom, left, right = table[:, 2:, None].unbind(1)  # each [B, 1]
            rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
            inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None]
            images = torch.where(inside[:, None], partners, images)

        soft = torch.zeros(batch, self.num_classes, device=images.device)
        soft.scatter_add_(1, labels[:, None], table[:, :1])
        soft.scatter_add_(1, labels.view(-1, 2).flip(1).view(-1, 1), 1 - table[:, :1])
        return images, soft

    def plan(self, epoch: int, samples: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Each row's own share [B] float64, and the box [B, 4] (top, bottom, left, right) it takes from its partner.

        Rows under mixup have an empty box; under cutmix the share is exactly the part of the pixels outside the box.
        """
        none = np.zeros((len(samples), 4), dtype=np.int64)
        if not self.cutmix:
            return (beta(self.mixup, self.seed, epoch, samples) if self.mixup else np.ones(len(samples))), none
        boxes = cut_boxes(
            beta(self.cutmix, self.seed, epoch, samples),
            uniforms(self.seed, epoch, samples, 2, BOX_STREAM),
            height,
            width,
        )
        share = 1 - (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / (height * width)
        if not self.mixup:
            return share, boxes
        is_cut = uniforms(self.seed, epoch, samples, 1, COIN_STREAM)[:, 0] < 0.5
        mixed = beta(self.mixup, self.seed, epoch, samples)
        return np.where(is_cut, share, mixed), np.where(is_cut[:, None], boxes, none)


def cut_boxes(share: np.ndarray, centre: np.ndarray, height: int, width: int) -> np.ndarray:
    """Boxes int64 [B, 4] (top, bottom, left, right): area about 1 - share, uniform centre, cut at the border."""
    half = 0.5 * np.sqrt(1 - share)
    half_height, half_width = (half * height).astype(np.int64), (half * width).astype(np.int64)
    y, x = (centre[:, 0] * height).astype(np.int64), (centre[:, 1] * width).astype(np.int64)
    top, bottom = np.maximum(y - half_height, 0), np.minimum(y + half_height, height)
    left, right = np.maximum(x - half_width, 0), np.minimum(x + half_width, width)
    return np.stack([top, bottom, left, right], axis=1)


def beta(alpha: float, seed: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """Beta(alpha, alpha) float64 [B], exact by rejection: each row is the first of its own tries that is accepted.

    alpha < 1: Johnk's method in logarithms (a small alpha would underflow). alpha >= 1: a uniform x is accepted with
    probability (4 x (1 - x))^(alpha - 1), the density over its maximum. Both accept at least 45 % up to alpha 4.
    """
    tries = 16
    while True:  # a longer row of uniforms begins with the shorter one, so more tries change no earlier answer
        u = uniforms(seed, epoch, samples, 2 * tries, LAMBDA_STREAM)
        first, second = u[:, 0::2], u[:, 1::2]
        if alpha < 1:
            log_x, log_y = np.log1p(-first) / alpha, np.log1p(-second) / alpha  # 1 - u is in (0, 1]
            accepted = np.logaddexp(log_x, log_y) <= 0
            value = 1 / (1 + np.exp(np.clip(log_y - log_x, -700, 700)))
        else:
            accepted = second < (4 * first * (1 - first)) ** (alpha - 1)
            value = first
        if accepted.any(axis=1).all():
            return np.take_along_axis(value, accepted.argmax(axis=1)[:, None], axis=1)[:, 0]
        tries *= 2
