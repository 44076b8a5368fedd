"""What every network of ours does: forward, gradients everywhere, small batches, layouts, precision, seeds, folders."""

from __future__ import annotations

import pytest
import torch

from dist_kd.models import build, load, save_student
from dist_kd.models.names import CIFAR, ORIGINALS
from dist_kd.teacher import fold_batch_norm

OURS = (*CIFAR, *ORIGINALS, "mobilenet_v2", "resnet34", "efficientnet_b0")
# one of each kind that is quick with real numbers, and the side it is shown here; the others differ from them in
# widths and repeats
REAL = {
    "cnn_small": 16,
    "resnet20_cifar": 16,
    "resnet8x4_cifar": 16,
    "resnet18_cifar": 16,
    "wrn_16_2_cifar": 16,
    "vgg8_cifar": 16,
    "resnext29_32x4d_cifar": 16,
    "densenet40_cifar": 16,
    "mobilenet_v2_cifar": 16,
    "efficientnet_b0_cifar": 32,
    "resnet18_fine": 16,
    "residual_cnn_folded": 32,
    "cnn_norm_last": 32,
    "mobilenets_s": 64,
}
CLASSES = tuple("abcdefg")


def images(arch: str, batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, REAL[arch], REAL[arch], generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("arch", OURS)
def test_backward_reaches_every_parameter(arch):
    """At the network's own size. A parameter without gradient would stop a data-parallel run."""
    with torch.device("meta"):
        network = build(arch, 7).train()
        output = network(torch.empty(2, 3, network.spec.image_size, network.spec.image_size))
    assert output.logits.shape == (2, 7) and output.features == {}
    output.logits.sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("arch", REAL)
class TestReal:
    def test_one_image_in_evaluation_is_the_first_of_two(self, arch):
        network = build(arch, 7).eval()
        pair = images(arch, 2)
        with torch.no_grad():
            assert torch.allclose(network(pair[:1]).logits, network(pair).logits[:1], atol=1e-5)

    def test_channels_last_and_bf16_agree(self, arch):
        torch.manual_seed(0)
        network = build(arch, 7)
        with torch.no_grad():
            for _ in range(2):  # statistics of these images: fresh ones let a deep network's signal fade or explode
                network.train()(images(arch, 8))
            network.eval()
            plain = network(images(arch, 2)).logits
            network = network.to(memory_format=torch.channels_last)
            turned = network(images(arch, 2).contiguous(memory_format=torch.channels_last)).logits
            with torch.autocast("cpu", torch.bfloat16):
                short = network(images(arch, 2)).logits
        assert torch.allclose(turned, plain, rtol=1e-3, atol=1e-4)
        assert short.dtype == torch.bfloat16
        assert (short.float() - plain).norm() < 0.1 * plain.norm()

    def test_folds_as_a_teacher(self, arch):
        torch.manual_seed(0)
        network = build(arch, 7)
        network.train()(images(arch, 8))
        network.eval()
        with torch.no_grad():
            expected = network(images(arch, 2)).logits
            found = fold_batch_norm(network)(images(arch, 2)).logits
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)

    def test_a_seed_gives_the_network(self, arch):
        weights = []
        for _ in range(2):
            torch.manual_seed(3)
            weights.append(torch.cat([p.detach().flatten() for p in build(arch, 7).parameters()]))
        assert torch.equal(*weights) and weights[0].isfinite().all()

    def test_comes_back_from_its_folder(self, arch, tmp_path):
        torch.manual_seed(1)
        network = build(arch, 7, image_size=REAL[arch])
        network(images(arch, 4))  # statistics that are not the initial ones
        network.eval()
        save_student(network, tmp_path / "student", classes=CLASSES, card="", extra={})
        again = load(tmp_path / "student")
        with torch.no_grad():
            assert torch.equal(again(images(arch, 2)).logits, network(images(arch, 2)).logits)
        assert again.taps == network.taps and again.spec.arch == arch
