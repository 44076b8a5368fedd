"""The teacher as a function: the student's pixels in its own constants, no gradient, nothing saved, well prepared."""

import dataclasses

import pytest
import torch
from torch import nn

from dist_kd import models
from dist_kd.contracts import ModelOutput
from dist_kd.methods.ensemble import MEMBERS
from dist_kd.teacher import Ensemble, SideBySide, Teacher

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def network(arch="cnn_medium", size=32):
    torch.manual_seed(0)
    net = models.build(arch, 10, "none", image_size=size)
    for module in net.modules():  # statistics as after training, or folding would have nothing to get wrong
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return net


def spec_of(net, **changes):
    return dataclasses.replace(net.spec, **changes)


def normalized(pixels, spec):
    return (pixels - torch.tensor(spec.mean).view(1, 3, 1, 1)) / torch.tensor(spec.std).view(1, 3, 1, 1)


def plain_logits(net, images):
    with torch.no_grad():
        return net.eval()(images).logits


def test_pixels_are_renormalized_from_the_students_constants():
    net, pixels = network(), torch.rand(4, 3, 32, 32)
    student = spec_of(net, mean=(0.1, 0.9, 0.4), std=(0.7, 0.3, 0.5))
    expected = plain_logits(net, normalized(pixels, net.spec))
    teacher = Teacher(net, student, image_size=32)
    assert torch.allclose(teacher(normalized(pixels, student)).logits, expected, atol=1e-4)
    same = Teacher(network(), net.spec, image_size=32)
    assert not any("re-normalized" in note for note in same.notes)


def test_another_resolution_is_resized():
    net = network()
    teacher = Teacher(net, net.spec, image_size=16)
    assert any("resized from 16 to its 32 px" in note for note in teacher.notes)
    images = torch.randn(2, 3, 16, 16)
    larger = nn.functional.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
    assert torch.allclose(teacher(images).logits, plain_logits(net, larger), atol=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("arch", ["cnn_medium", "resnet18", "efficientnet_lite0", "efficientnet_b0"])
def test_prepared_networks_agree_with_plain_ones(arch, precision):
    net = network(arch, 64)
    images = torch.nn.functional.interpolate(torch.randn(4, 3, 8, 8), size=(64, 64), mode="bilinear")
    expected = plain_logits(net, images)
    teacher = Teacher(net, net.spec, image_size=64, precision=precision)
    assert any("folded" in note and "not folded" not in note for note in teacher.notes), teacher.notes
    distance = (teacher(images).logits.float() - expected).norm() / expected.norm()
    assert distance < (1e-4 if precision == "no" else 0.1)


def test_a_network_that_cannot_be_traced_is_used_unfolded():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 10)

        def forward(self, x):
            x = x.mean((2, 3))
            return self.head(x if x.sum() > 0 else -x)

    net = network()
    net.net = Branching()
    teacher = Teacher(net, net.spec, image_size=32)
    assert any("not folded (" in note for note in teacher.notes)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(teacher(images).logits, plain_logits(net, images), atol=1e-6)


def test_a_network_whose_features_are_read_keeps_its_norms_and_says_why():
    net = network()
    net.want(["stage1"])
    teacher = Teacher(net, net.spec, image_size=32)
    assert any("not folded, as features are read" in note for note in teacher.notes), teacher.notes
    assert teacher(torch.randn(2, 3, 32, 32)).features.keys() == {"stage1"}


def test_a_prepared_network_that_disagrees_is_refused():
    net = network()
    spoilt = Teacher.__new__(Teacher)
    spoilt.spec, spoilt.device, spoilt.precision, spoilt.notes = net.spec, torch.device("cpu"), "no", []

    class Plain(nn.Module):  # its copy gives other logits each time
        def __init__(self):
            super().__init__()
            self.net, self.wants = nn.Identity(), frozenset()

        def forward(self, x):
            return ModelOutput(torch.randn(x.shape[0], 10), {})

    plain = Plain()
    assert spoilt._prepared(plain, channels_last=False) is plain
    assert any("refused" in note for note in spoilt.notes)


def test_frozen_and_nothing_is_saved_for_backward():
    net = network()
    teacher = Teacher(net, net.spec, image_size=32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        logits = teacher(torch.randn(2, 3, 32, 32, requires_grad=True)).logits
    assert sum(saved) == 0
    assert not logits.requires_grad
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert not any(m.training for m in teacher.network.modules())


def test_several_teachers_are_the_mean_of_their_softmax():
    first, second = network(), network("resnet18")
    pixels = torch.rand(4, 3, 32, 32)
    student = spec_of(first, mean=(0.1, 0.9, 0.4), std=(0.7, 0.3, 0.5))  # each is given the pixels as it wants them
    each = torch.stack([plain_logits(net, normalized(pixels, net.spec)) for net in (first, second)])
    both = Ensemble([Teacher(net, student, image_size=32) for net in (first, second)])
    given = both(normalized(pixels, student))
    assert torch.allclose(given.features[MEMBERS], each, atol=1e-3)
    assert torch.allclose(given.logits.softmax(1), each.softmax(2).mean(0), atol=1e-4)
    assert not given.logits.requires_grad
    assert both.spec.arch == f"{first.spec.arch}, {second.spec.arch}" and len(both.members) == 2
    together = SideBySide([first, second], first.spec)
    assert sum(p.numel() for p in together.parameters()) == sum(
        p.numel() for net in (first, second) for p in net.parameters()
    )
    assert together(pixels).shape == (4, 10)


def test_prepared_in_half_precision_the_mean_is_still_of_float32():
    teachers = [Teacher(net, net.spec, image_size=32, precision="bf16") for net in (network(), network())]
    given = Ensemble(teachers)(torch.randn(2, 3, 32, 32))
    assert given.logits.dtype == given.features[MEMBERS].dtype == torch.float32
