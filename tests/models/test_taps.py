"""Features by role: declared shapes, what is before a ReLU and what after, nothing overwritten, gradients through."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_kd.errors import ConfigError
from dist_kd.models import build
from dist_kd.models.names import CIFAR, ORIGINALS

# (channels of stages, their sides, channels before ReLU where others) at the network's own image size
RESNET, BOTTLENECK = (64, 128, 256, 512), (256, 512, 1024, 2048)
STEM, IMAGENET = (32, 16, 8, 4), (56, 28, 14, 7)
THREE = (32, 16, 8)
INVERTED = ((24, 32, 96, 320), IMAGENET)
VGG5 = ((64, 128, 256, 512, 512), (32, 16, 8, 4, 2))
DECLARED = {
    "cnn_small": ((16, 32, 64), (16, 8, 4)),
    "cnn_medium": ((16, 48, 192), (16, 8, 4)),
    **{f"resnet{n}_cifar": ((16, 32, 64), THREE) for n in (20, 32, 56, 110)},
    **{f"resnet{n}_cifar": ((64, 128, 256), THREE) for n in ("8x4", "32x4")},
    **{f"resnet{n}_cifar": (RESNET, STEM) for n in (18, 34)},
    **{f"resnet{n}_cifar": (BOTTLENECK, STEM) for n in (50, 152)},
    "resnext29_2x64d_cifar": (BOTTLENECK[:3], THREE),
    "resnext29_32x4d_cifar": (BOTTLENECK[:3], THREE),
    "resnext29_32x8d_cifar": (BOTTLENECK[1:], THREE),
    "wrn_16_2_cifar": ((32, 64, 128), THREE),
    "wrn_40_1_cifar": ((16, 32, 64), THREE),
    "wrn_40_2_cifar": ((32, 64, 128), THREE),
    "vgg8_cifar": (RESNET, STEM),
    "vgg13_cifar": (RESNET, STEM),
    "vgg19_bn_cifar": VGG5,
    "vgg19_bn_tiled": VGG5,
    "densenet40_cifar": ((168, 312, 456), THREE),
    "mobilenet_v2_cifar": ((24, 32, 96, 320), STEM, (96, 144, 192, 576)),
    "efficientnet_b0_cifar": ((16, 24, 40, 112, 320), (32, 16, 8, 4, 2), (32, 96, 144, 240, 672)),
    "resnet18_fine": (RESNET, (16, 16, 8, 8)),
    "residual_cnn": ((32, 64, 128), (29, 28, 27)),  # before ReLU, and before the pool, they are 1 pixel wider
    "residual_cnn_folded": ((32, 64, 128), (29, 28, 27)),
    "cnn_norm_last": ((32, 64, 128), THREE),
    "mobilenets_m": (*INVERTED, (64, 96, 128, 384)),
    "mobilenets_s": (*INVERTED, (32, 48, 64, 192)),
    "resnet18": (RESNET, IMAGENET),
    "resnet152": (BOTTLENECK, IMAGENET),
    "densenet121": ((256, 512, 1024, 1024), IMAGENET),
    "vgg19_bn": ((64, 128, 256, 512, 512), (224, 112, 56, 28, 14)),
    "vgg11": ((64, 128, 256, 512, 512), (224, 112, 56, 28, 14)),
    "mobilenet_v2": (*INVERTED, (96, 144, 192, 576)),
    "mobilenet_v3_small": ((16, 24, 48, 96), IMAGENET, (16, 72, 96, 288)),
    # the third project's taps on its student: 96, 144, 240, 672
    "efficientnet_b0": ((24, 40, 112, 320), IMAGENET, (96, 144, 240, 672)),
    "torchvision/efficientnet_b0": ((24, 40, 112, 320), IMAGENET, (96, 144, 240, 672)),
    "efficientnet_lite0": ((24, 40, 112, 320), IMAGENET, (96, 144, 240, 672)),
}
NO_NORM = {"vgg11", "cnn_norm_last"}  # none, or after the ReLU
POOLED = {
    "cnn_small": 64, "resnet152_cifar": 2048, "densenet40_cifar": 456, "efficientnet_b0_cifar": 320, "vgg19_bn": 4096,
    "vgg19_bn_tiled": 25_088, "residual_cnn": 500, "residual_cnn_folded": 93_312, "mobilenets_m": 1280, "vit_b_16": 768,
    "efficientnet_b0": 1280, "swin_t": 768,
}  # fmt: skip


def roles(network, kind: str) -> list[str]:
    return [role for role in network.taps if role.startswith(kind)]


@pytest.mark.parametrize("arch", DECLARED)
def test_shapes_are_as_declared(arch):
    channels, sides, *wide = DECLARED[arch]
    with torch.device("meta"):
        network = build(arch, 10)
    shapes = network.shapes(network.taps)
    assert [shapes[r] for r in roles(network, "stage")] == [(c, s, s) for c, s in zip(channels, sides, strict=True)]
    more = 1 if arch.startswith("residual_cnn") else 0
    expected = [(c, s + more, s + more) for c, s in zip(wide[0] if wide else channels, sides, strict=True)]
    assert [shapes[r] for r in roles(network, "pre_relu")] == expected
    norms = network.margin_norms()
    assert list(norms) == ([] if arch in NO_NORM else roles(network, "pre_relu"))
    assert all(norm.num_features == shapes[role][0] for role, norm in norms.items())


def test_no_network_of_ours_is_undeclared():
    assert {*CIFAR, *ORIGINALS} <= set(DECLARED)


@pytest.mark.parametrize("arch", POOLED)
def test_pooled_is_what_the_head_sees(arch):
    with torch.device("meta"):
        network = build(arch, 10)
    assert network.shapes(["pooled"]) == {"pooled": (POOLED[arch],)}


def test_shapes_leave_the_network_as_it_was():
    network = build("resnet20_cifar", 10, wants=frozenset({"stage1"})).train()
    before = copy.deepcopy(network.state_dict())
    assert network.shapes(["stage2", "layer1.0.conv1"], 64) == {"stage2": (32, 32, 32), "layer1.0.conv1": (16, 64, 64)}
    assert network.training and network.net.bn1.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert set(network(torch.randn(2, 3, 32, 32)).features) == {"stage1"}


class Witness:
    """What goes into and comes out of a module the last time it is called, copied at that moment."""

    def __init__(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module, inputs):
        self.inputs = inputs[0].clone()

    def _after(self, module, inputs, output):
        self.output = output.clone()


# of each kind of network one that is quick; what holds for their code holds for the larger ones
REAL = """
cnn_medium resnet20_cifar resnet18_cifar resnext29_32x4d_cifar wrn_16_2_cifar vgg8_cifar densenet40_cifar
mobilenet_v2_cifar efficientnet_b0_cifar resnet18_fine residual_cnn cnn_norm_last mobilenets_s densenet121 mobilenet_v2
efficientnet_b0 timm/resnet18
"""


@pytest.mark.parametrize("arch", REAL.split())
def test_before_relu_is_before_relu(arch):
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    size = {"residual_cnn": 14, "mobilenets_s": 64, "densenet121": 64, "mobilenet_v2": 64, "efficientnet_b0": 64}
    side = size.get(arch, 32)
    plain = build(arch, 10, image_size=side)
    wants = frozenset(plain.taps)
    network = build(arch, 10, wants=wants, image_size=side)
    for module in plain.modules():  # some libraries begin a residual branch at weight 0
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    network.load_state_dict(plain.state_dict())
    network.train()
    plain.train()
    witnesses = {role: Witness(network.net.get_submodule(network.taps[role].module)) for role in wants}
    images = torch.randn(4, 3, side, side)
    torch.manual_seed(1)
    output = network(images)
    torch.manual_seed(1)
    assert torch.equal(plain(images).logits, output.logits)  # to look changes nothing
    assert set(output.features) == wants
    for role, tap in network.taps.items():
        seen = witnesses[role].inputs if tap.before else witnesses[role].output
        assert torch.equal(output.features[role], seen), f"{role} was overwritten"
        if role.startswith("pre_relu"):
            assert (output.features[role] < 0).float().mean() > 0.05
            activation = network.net.get_submodule(tap.module)
            if tap.before and isinstance(activation, nn.ReLU):
                assert torch.equal(F.relu(output.features[role]), witnesses[role].output)
    sum(feature.square().mean() for feature in output.features.values()).backward()
    first = next(network.parameters())
    assert first.grad is not None and first.grad.abs().sum() > 0


@pytest.mark.parametrize("arch", ["resnet18_cifar", "resnext29_32x4d_cifar", "vgg8_cifar"])
def test_relu_of_it_is_the_stage(arch):
    torch.manual_seed(0)
    features = build(arch, 10, wants=frozenset({"stage2", "pre_relu2"}))(torch.randn(2, 3, 16, 16)).features
    assert torch.equal(F.relu(features["pre_relu2"]), features["stage2"])


@pytest.mark.parametrize(("arch", "after"), [("densenet40_cifar", "conv2"), ("wrn_16_2_cifar", "layer3.0.conv1")])
def test_relu_of_it_enters_the_next_convolution(arch, after):
    network = build(arch, 10, wants=frozenset({"pre_relu2"}))
    witness = Witness(network.net.get_submodule(after))
    features = network(torch.randn(2, 3, 16, 16)).features
    assert torch.equal(F.relu(features["pre_relu2"]), witness.inputs)


def test_a_norms_output_is_safe_from_what_follows():
    """torchvision's DenseNet applies a functional ReLU in place, its ResNet adds the shortcut in place."""
    for arch, name in (("densenet121", "pre_relu4"), ("resnet18", "layer1.1.bn2")):
        torch.manual_seed(0)
        network = build(arch, 10, wants=frozenset({name}))
        norm = network.net.get_submodule(network.tap(name).module)
        witness = Witness(norm)
        feature = network(torch.randn(2, 3, 64, 64)).features[name]
        assert torch.equal(feature, witness.output) and (feature < 0).any()


def test_the_margins_norm_describes_the_feature():
    """In training each channel has its norm's bias and |weight| as mean and std."""
    torch.manual_seed(0)
    network = build("vgg8_cifar", 10, wants=frozenset({"pre_relu2"})).train()
    norm = network.margin_norms()["pre_relu2"]
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    feature = network(torch.randn(16, 3, 32, 32)).features["pre_relu2"].transpose(0, 1).flatten(1)
    assert torch.allclose(feature.mean(1), norm.bias, atol=1e-4)
    assert torch.allclose(feature.std(1), norm.weight.abs(), rtol=1e-3)


def test_timms_networks_have_roles_too():
    pytest.importorskip("timm")
    with torch.device("meta"):
        resnet, b0, vit = (build(f"timm/{n}", 10) for n in ("resnet50", "efficientnet_b0", "vit_tiny_patch16_224"))
    assert [s[0] for r, s in resnet.shapes(resnet.taps).items() if r.startswith("pre_relu")] == list(BOTTLENECK)
    assert list(resnet.margin_norms()) == roles(resnet, "pre_relu")
    assert [b0.shapes([r])[r] for r in roles(b0, "stage")] == [(24, 56, 56), (40, 28, 28), (112, 14, 14), (320, 7, 7)]
    assert list(vit.taps) == ["pooled"]


def test_roles_can_be_asked_for_after_a_look_at_them():
    torch.manual_seed(0)
    asked = build("resnet20_cifar", 10, wants=frozenset({"pre_relu1", "stage1"})).eval()
    network = build("resnet20_cifar", 10).eval()
    network.load_state_dict(asked.state_dict())
    network.want(["stage1"])
    network.want(["stage1", "pre_relu1"])
    assert network.wants == asked.wants
    images = torch.randn(2, 3, 16, 16)
    found, expected = network(images).features, asked(images).features
    assert found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


def test_a_role_that_a_network_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"`resnet20_cifar` has no feature `stage4` to tap; did you mean `stage"):
        build("resnet20_cifar", 10, wants=frozenset({"stage4"}))


def test_roles_survive_copies_and_compilation():
    torch._dynamo.reset()
    wants = frozenset({"stage1", "pre_relu3", "pooled"})
    torch.manual_seed(0)
    network = build("resnet8x4_cifar", 10, wants=wants)
    twin = copy.deepcopy(network)
    images = torch.randn(2, 3, 16, 16)
    expected = network(images)
    twin.net.compile(backend="eager", fullgraph=True)
    found = twin(images)
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(found.features[role], expected.features[role]) for role in wants)
    found.features["pre_relu3"].sum().backward()
    assert twin.net.conv1.weight.grad.abs().sum() > 0 and network.net.conv1.weight.grad is None
