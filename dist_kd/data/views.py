"""What the network sees of an image: pixels + (seed, epoch, sample) -> a training or evaluation view, uint8.

A view depends on nothing else: not on its neighbours, the worker, the rank or a generator's state. This file owns the
names of the augmentations, their order and their draws; `augment.py` holds what each does to pixels. No torch is
imported until a view is made, because the command line checks names before it loads torch.
"""

from __future__ import annotations

import difflib
import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dist_kd.data.draws import uniforms
from dist_kd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


class Augment(NamedTuple):
    """How an augmentation draws. `stream` is its own for ever, so that adding another changes no draw of this one."""

    stream: int
    draws: int  # uniforms per sample
    group: str = ""  # at most one of a group can be chosen


# in the order they are applied: geometry, flips, rotation, colours, erasing
AUGMENTS: dict[str, Augment] = {
    "crop": Augment(stream=1, draws=2, group="crop"),
    "rrc": Augment(stream=2, draws=22, group="crop"),
    "flip": Augment(stream=3, draws=1),
    "vflip": Augment(stream=4, draws=1),
    "rotate": Augment(stream=5, draws=1),
    "jitter": Augment(stream=6, draws=6),
    "randaugment": Augment(stream=7, draws=4, group="policy"),
    "autoaugment": Augment(stream=8, draws=5, group="policy"),
    "autoaugment_cifar": Augment(stream=9, draws=5, group="policy"),
    "trivialaugment": Augment(stream=10, draws=3, group="policy"),
    "erase": Augment(stream=11, draws=23),
}
EXACT = ("crop", "flip", "vflip")  # move pixels without computing any, so whole batches are indexed at once


def check_augment(text: str) -> tuple[str, ...]:
    """The augmentations named in `crop+flip+erase`, in the order they are applied; `none` gives ().

    Raises ConfigError for an unknown or repeated name and for two that exclude each other.
    """
    names = [name.strip() for name in text.split("+")]
    if names == ["none"]:
        return ()
    if "none" in names:
        raise ConfigError(f"augmentation `{text}` joins none with others; write none alone, or leave it out")
    for name in names:
        if name not in AUGMENTS:
            near = difflib.get_close_matches(name, AUGMENTS, n=3)
            hint = f"did you mean {' or '.join(f'`{n}`' for n in near)}? " if near else ""
            raise ConfigError(
                f"augmentation `{name}` in `{text}` is unknown; {hint}"
                f"choose from {', '.join(AUGMENTS)}, joined by +, or none alone"
            )
        if names.count(name) > 1:
            raise ConfigError(f"augmentation `{name}` stands twice in `{text}`; name it once")
    chosen = tuple(name for name in AUGMENTS if name in names)
    for group in ("crop", "policy"):
        rivals = [name for name in chosen if AUGMENTS[name].group == group]
        if len(rivals) > 1:
            what = "ways to cut the view" if group == "crop" else "policies that choose their own colours"
            raise ConfigError(f"augmentations `{'` and `'.join(rivals)}` in `{text}` are both {what}; keep one")
    return chosen


class TrainView:
    """The training view: `view(pixels, epoch, sample)`, uint8 [3, h, w] -> uint8 [3, S, S].

    Without crop and rrc the image is first brought to S x S as in EvalView at crop_pct 1.
    """

    def __init__(self, augment: str, image_size: int, seed: int):
        self.names = check_augment(augment)
        self.image_size = image_size
        self.seed = seed

    def __call__(self, pixels: Tensor, epoch: int, sample: int) -> Tensor:
        """The view of one image in this epoch; `sample` is its number in the index."""
        return self._apply(pixels, self._draw(epoch, np.array([sample])), 0, self.names)

    def batch(
        self, pixels: Tensor | Iterable[Tensor], epoch: int, samples: np.ndarray, out: Tensor | None = None
    ) -> Tensor:
        """The views uint8 [B, 3, S, S], byte for byte those of the single calls; in `out` if there is one.

        `pixels` is uint8 [B, 3, h, w], or images of any sizes, which are asked for one at a time.
        """
        from dist_kd.data import augment

        draws = self._draw(epoch, samples)  # of all at once: thirty times as fast as of each
        names = self.names
        if getattr(pixels, "shape", ())[-2:] == (self.image_size, self.image_size):
            first = tuple(itertools.takewhile(EXACT.__contains__, names))  # behind rrc a flip has to wait its turn
            pixels = augment.shift_and_flip(pixels, {name: draws[name] for name in first})
            names = names[len(first) :]
            if not names:
                return pixels if out is None else out.copy_(pixels)
        views = augment.blank(len(samples), self.image_size) if out is None else out
        for row, image in enumerate(pixels):
            views[row] = self._apply(image, draws, row, names)
        return views

    def _draw(self, epoch: int, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Per augmentation its uniforms, float64 [B, draws]."""
        return {
            name: uniforms(self.seed, epoch, samples, AUGMENTS[name].draws, AUGMENTS[name].stream)
            for name in self.names
        }

    def _apply(self, image: Tensor, draws: dict[str, np.ndarray], row: int, names: tuple[str, ...]) -> Tensor:
        from dist_kd.data import augment

        if "rrc" not in names:
            image = augment.fit(image, self.image_size)
        for name in names:
            image = augment.APPLY[name](image, draws[name][row].tolist(), self.image_size)
        return image


class EvalView:
    """The evaluation view: `view(pixels)`, uint8 [3, h, w] -> uint8 [3, S, S], the same each time.

    The shorter side goes to round(S / crop_pct) (antialiased), then the centre is cropped. An image that is already
    S x S is left as it is, whatever crop_pct. `interpolation` is "bilinear" or "bicubic".
    """

    def __init__(self, image_size: int, crop_pct: float = 1.0, interpolation: str = "bilinear"):
        if not 0 < crop_pct <= 1:
            raise ConfigError(f"crop_pct is `{crop_pct}`, but must be above 0 and at most 1; 1 keeps the whole side")
        if interpolation not in ("bilinear", "bicubic"):
            raise ConfigError(f"interpolation is `{interpolation}`, but must be bilinear or bicubic")
        self.image_size = image_size
        self.resize_to = round(image_size / crop_pct)
        self.interpolation = interpolation

    def __call__(self, pixels: Tensor) -> Tensor:
        """The view of one image."""
        from dist_kd.data import augment

        return augment.fit(pixels, self.image_size, self.resize_to, self.interpolation)

    def batch(self, pixels: Tensor | Iterable[Tensor], out: Tensor | None = None) -> Tensor:
        """The views uint8 [B, 3, S, S], byte for byte those of the single calls; arguments as in TrainView."""
        import torch

        if getattr(pixels, "shape", ())[-2:] == (self.image_size, self.image_size):
            return pixels if out is None else out.copy_(pixels)
        if out is None:
            return torch.stack([self(image) for image in pixels])
        for row, image in enumerate(pixels):
            out[row] = self(image)
        return out
