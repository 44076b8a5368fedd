"""Views are functions of (seed, epoch, sample), equal in batches and one by one, and distributed as torchvision's."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dist_kd.data.augment import APPLY, GREY, erase_box, rrc_box
from dist_kd.data.draws import uniforms
from dist_kd.data.views import AUGMENTS, EvalView, TrainView, check_augment
from dist_kd.errors import ConfigError

torch.set_num_threads(1)

AUGMENTATIONS = [
    *AUGMENTS,
    "none",
    "crop+flip",
    "crop+flip+vflip+erase",
    "rrc+flip+rotate+jitter+randaugment+erase",
    "crop+flip+autoaugment_cifar+erase",
]


def pictures(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, height, width), dtype=np.uint8))


def smooth(size: int = 16) -> torch.Tensor:
    """A picture on which every operation shows: gradients in each channel."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([y * 9 + 40, x * 7 + 60, (x + y) * 5 + 20]).to(torch.uint8)


def ks(a: np.ndarray, b: np.ndarray) -> float:
    """The Kolmogorov-Smirnov distance of two samples, over its 0.1 % bound: above 1 they differ."""
    grid = np.sort(np.concatenate([a, b]))
    cdf = [np.searchsorted(np.sort(values), grid, side="right") / len(values) for values in (a, b)]
    return float(np.abs(cdf[0] - cdf[1]).max() / (1.95 * ((len(a) + len(b)) / (len(a) * len(b))) ** 0.5))


# names


def test_names_come_in_the_order_they_are_applied():
    assert check_augment("erase+flip+crop") == ("crop", "flip", "erase")
    assert check_augment("none") == ()
    assert check_augment(" rrc + flip ") == ("rrc", "flip")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("crop+flpi", "`flpi` in `crop+flpi` is unknown; did you mean `flip`"),
        ("", "choose from crop, rrc, flip"),
        ("crop+rrc", "`crop` and `rrc`"),
        ("randaugment+trivialaugment", "`randaugment` and `trivialaugment`"),
        ("flip+flip", "twice"),
        ("none+flip", "none"),
    ],
)
def test_impossible_names_are_refused(text, said):
    with pytest.raises(ConfigError) as error:
        check_augment(text)
    assert said in str(error.value)


def test_each_augmentation_has_its_own_draws():
    streams = [augment.stream for augment in AUGMENTS.values()]
    assert len(set(streams)) == len(streams) and max(streams) < 32  # mix.py has 32 and more


def test_names_are_checked_without_torch():
    code = "import sys; from dist_kd.data import views; views.check_augment('rrc'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


# properties of all


@pytest.mark.parametrize("text", AUGMENTATIONS)
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (20, 45, 24), (40, 28, 32)])
def test_a_batch_is_its_samples_one_by_one(text, height, width, size):
    images, samples = pictures(24, height, width), np.arange(100, 124)
    before = images.clone()
    view = TrainView(text, size, seed=7)
    batch = view.batch(images, 3, samples)
    single = torch.stack([view(image, 3, int(sample)) for image, sample in zip(images, samples, strict=True)])
    assert batch.dtype == torch.uint8 and batch.shape == (24, 3, size, size)
    assert torch.equal(batch, single)
    assert torch.equal(images, before)


@pytest.mark.parametrize("text", AUGMENTATIONS)
def test_a_view_is_a_function_of_seed_epoch_and_sample(text):
    images, samples = pictures(24), np.arange(24)
    torch.manual_seed(1)
    view = TrainView(text, 32, seed=7)
    first = view.batch(images, 3, samples)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(view.batch(images.flip(0), 3, samples[::-1]).flip(0), first)  # other neighbours, another order
    assert torch.equal(torch.get_rng_state(), state)  # no generator was used
    if text != "none":
        assert not torch.equal(view.batch(images, 4, samples), first)
        assert not torch.equal(TrainView(text, 32, seed=8).batch(images, 3, samples), first)
        assert not torch.equal(view.batch(images, 3, samples + 24), first)


def test_another_augmentation_changes_no_draw_of_the_first():
    images, samples = pictures(64), np.arange(64)
    cropped = TrainView("crop", 32, 0).batch(images, 0, samples)
    flipped = TrainView("crop+flip", 32, 0).batch(images, 0, samples)
    same = (flipped == cropped).flatten(1).all(1)
    mirrored = (flipped == cropped.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all() and 16 < same.sum() < 48


# each against torchvision or arithmetic


def test_crop_is_a_window_of_the_padded_image():
    images, samples = pictures(500), np.arange(500)
    views = TrainView("crop", 32, 3).batch(images, 0, samples)
    places = np.floor(uniforms(3, 0, samples, 2, AUGMENTS["crop"].stream) * 9).astype(int)  # 4 pixels each way
    for image, found, (top, left) in zip(images, views, places, strict=True):
        assert torch.equal(found, torch.nn.functional.pad(image, (4, 4, 4, 4))[:, top : top + 32, left : left + 32])
    assert len({tuple(place) for place in places}) == 81  # all of them occur


def test_flips_are_fair():
    images, samples = pictures(2000, 8, 8), np.arange(2000)
    flipped = TrainView("flip", 8, 3).batch(images, 0, samples)
    turned = TrainView("vflip", 8, 3).batch(images, 0, samples)
    count = (flipped == images.flip(3)).flatten(1).all(1).sum().item()
    assert 900 < count < 1100
    assert ((flipped == images) | (flipped == images.flip(3))).flatten(1).all()
    assert 900 < (turned == images.flip(2)).flatten(1).all(1).sum().item() < 1100


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 400), (32, 32)])
def test_rrc_boxes_are_distributed_as_torchvisions(height, width):
    count = 3000
    ours = np.array([rrc_box(height, width, u.tolist()) for u in uniforms(1, 0, np.arange(count), 22, 2)])
    image = torch.empty(3, height, width, dtype=torch.uint8)
    transform = v2.RandomResizedCrop(10)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params = [transform.make_params([image]) for _ in range(count)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params])
    assert (ours[:, :2] >= 0).all() and (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for column in range(4):
        assert ks(ours[:, column], theirs[:, column]) < 1
    for value in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0] / (height - b[:, 2] + 1)):
        assert ks(value(ours), value(theirs)) < 1


def test_rrc_falls_back_to_the_centre():
    # in 10 x 400 pixels no try fits but the smallest areas; with all draws near 1 the box is torchvision's fallback
    assert rrc_box(10, 400, [0.999] * 22) == (0, (400 - 13) // 2, 10, 13)
    assert rrc_box(400, 10, [0.999] * 22) == ((400 - 13) // 2, 0, 13, 10)


def test_rrc_resizes_its_box():
    image, u = pictures(1, 50, 70)[0], uniforms(4, 2, np.array([9]), 22, AUGMENTS["rrc"].stream)[0].tolist()
    box = rrc_box(50, 70, u)
    expected = F.resized_crop(image, *box, [24, 24], antialias=True)
    assert torch.equal(TrainView("rrc", 24, 4)(image, 2, 9), expected)


def test_rotation_is_uniform_within_15_degrees():
    image = smooth()
    for sample in range(20):
        angle = 15 * (2 * uniforms(0, 0, np.array([sample]), 1, AUGMENTS["rotate"].stream)[0, 0] - 1)
        assert torch.equal(TrainView("rotate", 16, 0)(image, 0, sample), F.rotate(image, angle))


def test_jitter_spreads_brightness_evenly():
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)  # contrast and saturation change nothing of it
    view = TrainView("jitter", 4, 0)
    levels = np.array([view(grey, 0, sample)[0, 0, 0].item() for sample in range(2000)])
    assert ks(levels, np.random.default_rng(0).uniform(60, 140, 20_000).astype(int)) < 1


def test_jitter_has_torchvisions_outcomes():
    image, count = smooth(), 1500
    view, transform = TrainView("jitter", 16, 0), v2.ColorJitter(0.4, 0.4, 0.4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.stack([transform(image) for _ in range(count)]).float()
    ours = torch.stack([view(image, 0, sample) for sample in range(count)]).float()
    for channel in range(3):
        for value in (lambda x: x.mean((1, 2)), lambda x: x.std((1, 2))):
            assert ks(value(ours[:, channel]).numpy(), value(theirs[:, channel]).numpy()) < 1


def test_jitter_applies_its_steps_in_the_drawn_order():
    image, u = smooth(), [0.9, 0.1, 0.95]  # factors 1.32, 0.68 and 1.36 of brightness, contrast and saturation
    results = set()
    for order in itertools.permutations(range(3)):
        expected = image
        for k in order:
            step = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)[k]
            expected = step(expected, 0.6 + 0.8 * u[k])
        ranks = [0.1 + 0.3 * order.index(k) for k in range(3)]
        assert torch.equal(APPLY["jitter"](image, u + ranks, 16), expected)
        results.add(expected.numpy().tobytes())
    assert len(results) == 6


def outcomes(transform, image: torch.Tensor, count: int) -> dict[bytes, int]:
    """How often each result occurs."""
    found: dict[bytes, int] = {}
    for _ in range(count):
        result = transform(image).numpy().tobytes()
        found[result] = found.get(result, 0) + 1
    return found


def test_randaugment_applies_two_of_torchvisions_operations():
    image, one = smooth(), v2.RandAugment(num_ops=1)
    view = TrainView("randaugment", 16, 0)
    ours = {view(image, 0, sample).numpy().tobytes() for sample in range(400)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = outcomes(one, image, 400)
        second = set()
        for result in first:
            middle = torch.frombuffer(bytearray(result), dtype=torch.uint8).view(3, 16, 16)
            second |= set(outcomes(one, middle, 300))
    assert ours <= second and len(ours) > 100


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("autoaugment", v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)),
        ("autoaugment_cifar", v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)),
        ("trivialaugment", v2.TrivialAugmentWide()),
        ("randaugment", v2.RandAugment()),
    ],
)
def test_policies_have_torchvisions_distribution(name, transform):
    image, count = smooth(), 3000
    numbers = iter(range(count))
    view = TrainView(name, 16, 0)
    ours = outcomes(lambda x: view(x, 0, next(numbers)), image, count)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = outcomes(transform, image, count)
    # two samples of one distribution: the difference of two counts has about the variance of their sum
    often = [result for result in set(ours) | set(theirs) if ours.get(result, 0) + theirs.get(result, 0) >= 20]
    z = [(ours.get(r, 0) - theirs.get(r, 0)) / (ours.get(r, 0) + theirs.get(r, 0)) ** 0.5 for r in often]
    assert len(often) > 10
    assert len(ours) == pytest.approx(len(theirs), rel=0.1)  # as many different results, so as many free choices
    assert np.abs(z).max() < 5 and np.mean(np.square(z)) < 2
    assert sum(theirs.get(r, 0) for r in often) == pytest.approx(sum(ours.get(r, 0) for r in often), rel=0.1)


def test_erase_boxes_are_distributed_as_torchvisions():
    count = 8000
    boxes = [erase_box(32, 40, u.tolist()) for u in uniforms(1, 0, np.arange(count), 23, 11)]
    ours = np.array([box for box in boxes if box])
    assert abs(len(ours) / count - 0.25) < 4 * (0.25 * 0.75 / count) ** 0.5
    transform, image = v2.RandomErasing(p=1), torch.empty(3, 32, 40, dtype=torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params = [transform.make_params([image]) for _ in range(2000)]
    theirs = np.array([[p["i"], p["j"], p["h"], p["w"]] for p in params])
    for column in range(4):
        assert ks(ours[:, column], theirs[:, column]) < 1


def test_erase_fills_with_the_mean_colour():
    black = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    views = TrainView("erase", 32, 0).batch(black, 0, np.arange(64))
    changed = views.flatten(2).any(2).any(1)
    assert 5 < changed.sum() < 30
    colours = {tuple(colour) for view in views for colour in view.flatten(1).T.tolist()}
    assert colours == {(0, 0, 0), GREY}


# evaluation


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_is_torchvisions_resize_and_centre_crop(interpolation):
    images = pictures(3, 60, 80)
    view = EvalView(32, 32 / 36, interpolation)
    usual = v2.Compose(
        [v2.Resize(36, interpolation=v2.InterpolationMode(interpolation), antialias=True), v2.CenterCrop(32)]
    )
    assert torch.equal(view.batch(images), usual(images))
    assert torch.equal(view(images[1]), usual(images[1]))


def test_evaluation_sizes():
    assert EvalView(224, 224 / 232).resize_to == 232
    assert EvalView(224, 0.875).resize_to == 256
    assert EvalView(224, 1.0)(pictures(1, 100, 400)[0]).shape == (3, 224, 224)
    images = pictures(2, 32, 32)
    assert torch.equal(EvalView(32, 0.875).batch(images), images)  # already right: whatever crop_pct


def test_training_without_crop_sees_the_evaluation_view():
    images = pictures(4, 50, 40)
    assert torch.equal(TrainView("none", 24, 0).batch(images, 0, np.arange(4)), EvalView(24, 1.0).batch(images))


@pytest.mark.parametrize(("crop_pct", "interpolation"), [(0, "bilinear"), (1.2, "bilinear"), (0.9, "nearest")])
def test_impossible_evaluation_is_refused(crop_pct, interpolation):
    with pytest.raises(ConfigError):
        EvalView(32, crop_pct, interpolation)
