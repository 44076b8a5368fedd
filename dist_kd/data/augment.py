"""What each augmentation does to one image: uint8 [3, h, w], a list of uniforms in [0, 1), the side S -> uint8.

torchvision's functional kernels and policy tables do the work; the choices come from the uniforms, never from a
generator. Parameters are those of torchvision's classes at their defaults (rotation and policies: nearest, black).

Images lie in memory with channels last, as decoding gives them and networks take them: torch resizes them faster so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

GREY = (124, 116, 104)  # ImageNet's mean pixel, per channel
DEGREES = 15.0
JITTER = 0.4


def fit(image: Tensor, size: int, resize_to: int | None = None, interpolation: str = "bilinear") -> Tensor:
    """The centre `size` x `size` after the shorter side went to `resize_to`; unchanged if it has that size already."""
    if image.shape[-2:] == (size, size):
        return image
    mode = InterpolationMode(interpolation)
    image = F.resize(_channels_last(image), [resize_to or size], interpolation=mode, antialias=True)
    return F.center_crop(image, [size, size])


def blank(count: int, size: int) -> Tensor:
    """Room for views: uint8 [count, 3, size, size], channels last, not filled."""
    return torch.empty((count, 3, size, size), dtype=torch.uint8, memory_format=torch.channels_last)


def margin(size: int) -> int:
    """Pixels of black around the image before a crop: an eighth of the side, at least one."""
    return max(1, (size + 4) // 8)


def rrc_box(height: int, width: int, u: list[float]) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random resized crop: torchvision's rule, area .08-1, ratio 3/4-4/3; 22 uniforms."""
    low, high = math.log(3 / 4), math.log(4 / 3)
    for u_area, u_ratio in zip(u[0:20:2], u[1:20:2], strict=True):  # ten tries, then the largest fitting centre
        area = height * width * (0.08 + 0.92 * u_area)
        ratio = math.exp(low + (high - low) * u_ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def erase_box(height: int, width: int, u: list[float]) -> tuple[int, int, int, int] | None:
    """Top, left, height, width of the erased box, or None: torchvision's rule, p .25, area .02-.33, ratio .3-3.3."""
    if u[0] >= 0.25:
        return None
    low, high = math.log(0.3), math.log(3.3)
    for u_area, u_ratio in zip(u[1:21:2], u[2:21:2], strict=True):
        area = height * width * (0.02 + 0.31 * u_area)
        ratio = math.exp(low + (high - low) * u_ratio)
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            return int(u[21] * (height - h + 1)), int(u[22] * (width - w + 1)), h, w
    return None


def _crop(image: Tensor, u: list[float], size: int) -> Tensor:
    pad = margin(size)
    places = 2 * pad + 1
    return F.crop(F.pad(image, [pad] * 4), int(u[0] * places), int(u[1] * places), size, size)


def _rrc(image: Tensor, u: list[float], size: int) -> Tensor:
    top, left, height, width = rrc_box(image.shape[-2], image.shape[-1], u)
    # the same bytes as F.resized_crop gives, for 2/3 of its time: out of the larger image torch copies pixel by pixel
    crop = _channels_last(image[:, top : top + height, left : left + width])
    return F.resize(crop, [size, size], interpolation=InterpolationMode.BILINEAR, antialias=True)


def _channels_last(image: Tensor) -> Tensor:
    """The same image without gaps between its rows and with its channels last in memory."""
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _flip(image: Tensor, u: list[float], size: int) -> Tensor:
    return image.flip(-1) if u[0] < 0.5 else image


def _vflip(image: Tensor, u: list[float], size: int) -> Tensor:
    return image.flip(-2) if u[0] < 0.5 else image


def _rotate(image: Tensor, u: list[float], size: int) -> Tensor:
    return F.rotate(image, DEGREES * (2 * u[0] - 1))


def _jitter(image: Tensor, u: list[float], size: int) -> Tensor:
    steps = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for k in sorted(range(3), key=u[3:6].__getitem__):  # three uniforms sorted are a fair random order
        image = steps[k](image, 1 + JITTER * (2 * u[k] - 1))
    return image


@functools.cache
def _policy(name: str) -> v2.RandAugment | v2.AutoAugment | v2.TrivialAugmentWide:
    make = {
        "randaugment": lambda: v2.RandAugment(num_ops=2, magnitude=9, num_magnitude_bins=31),
        "autoaugment": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET),
        "autoaugment_cifar": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
        "trivialaugment": lambda: v2.TrivialAugmentWide(num_magnitude_bins=31),
    }
    return make[name]()


def _policy_op(policy, image: Tensor, op: str, bins: int, level: float | None, u_sign: float) -> Tensor:
    """One operation of torchvision's table at magnitude number `level` of `bins`, negated for u_sign < .5."""
    magnitudes, signed = policy._AUGMENTATION_SPACE[op]
    values = magnitudes(bins, image.shape[-2], image.shape[-1])
    magnitude = 0.0 if values is None else float(values[int(level)])
    if signed and u_sign < 0.5:
        magnitude = -magnitude
    return policy._apply_image_or_video_transform(
        image, op, magnitude, interpolation=policy.interpolation, fill=policy._fill
    )


def _randaugment(image: Tensor, u: list[float], size: int) -> Tensor:
    policy = _policy("randaugment")
    ops = tuple(policy._AUGMENTATION_SPACE)
    for k in range(policy.num_ops):
        op = ops[int(u[2 * k] * len(ops))]
        image = _policy_op(policy, image, op, policy.num_magnitude_bins, policy.magnitude, u[2 * k + 1])
    return image


def _trivialaugment(image: Tensor, u: list[float], size: int) -> Tensor:
    policy = _policy("trivialaugment")
    ops, bins = tuple(policy._AUGMENTATION_SPACE), policy.num_magnitude_bins
    return _policy_op(policy, image, ops[int(u[0] * len(ops))], bins, int(u[1] * bins), u[2])


def _autoaugment(name: str, image: Tensor, u: list[float], size: int) -> Tensor:
    policy = _policy(name)
    pair = policy._policies[int(u[0] * len(policy._policies))]
    for k, (op, probability, level) in enumerate(pair):
        if u[1 + 2 * k] < probability:
            image = _policy_op(policy, image, op, 10, level, u[2 + 2 * k])
    return image


def _erase(image: Tensor, u: list[float], size: int) -> Tensor:
    box = erase_box(image.shape[-2], image.shape[-1], u)
    if box is None:
        return image
    return F.erase(image, *box, torch.tensor(GREY, dtype=torch.uint8).view(3, 1, 1))


APPLY: dict[str, Callable[[Tensor, list[float], int], Tensor]] = {
    "crop": _crop,
    "rrc": _rrc,
    "flip": _flip,
    "vflip": _vflip,
    "rotate": _rotate,
    "jitter": _jitter,
    "randaugment": _randaugment,
    "autoaugment": functools.partial(_autoaugment, "autoaugment"),
    "autoaugment_cifar": functools.partial(_autoaugment, "autoaugment_cifar"),
    "trivialaugment": _trivialaugment,
    "erase": _erase,
}


def shift_and_flip(pixels: Tensor, draws: dict[str, np.ndarray]) -> Tensor:
    """Crop, flip and vflip of a whole batch uint8 [B, 3, S, S] whose images have the view's size already.

    `draws` holds the uniforms [B, n] of those asked for. The same bytes as the single operations, and about fifty
    times faster: numpy's window view turns the crops into one indexed copy. The input is not changed. Channels lie
    last in memory on the way, as decoding gives them and the networks take them: longer runs of bytes are copied.
    """
    images = pixels.permute(0, 2, 3, 1).numpy()  # [B, S, S, 3]
    size = images.shape[1]
    if "crop" in draws:
        pad = margin(size)
        padded = np.zeros((len(images), size + 2 * pad, size + 2 * pad, 3), dtype=np.uint8)
        padded[:, pad : pad + size, pad : pad + size] = images
        top, left = (draws["crop"] * (2 * pad + 1)).astype(np.int64).T
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
        images = windows.transpose(0, 1, 2, 4, 5, 3)[np.arange(len(images)), top, left]
    elif draws:
        images = images.copy()
    if "flip" in draws:
        chosen = draws["flip"][:, 0] < 0.5
        # torch turns rows of RGB pixels round by whole registers, numpy byte by byte: a quarter of the time
        images[chosen] = torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).flip(-1).permute(0, 2, 3, 1).numpy()
    if "vflip" in draws:
        chosen = draws["vflip"][:, 0] < 0.5
        images[chosen] = images[chosen][:, ::-1]
    return torch.from_numpy(images).permute(0, 3, 1, 2)
