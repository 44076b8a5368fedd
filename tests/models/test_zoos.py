"""Each zoo builds what it says: other libraries' numbers, one output form."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

from dist_kd.errors import ConfigError
from dist_kd.models import build
from dist_kd.models import torchvision_zoo as tv
from dist_kd.models.names import TORCHVISION

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# the smallest of each family: the larger ones are built by the same lines
FAMILIES = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0
swin_t swin_v2_t vgg11 vgg11_bn vit_b_16 wide_resnet50_2
"""


@pytest.mark.parametrize("arch", FAMILIES.split())
def test_torchvisions_networks_give_logits(arch):
    # regnets compute their widths with tensors, so shapes alone do not do
    with torch.device("cpu" if arch.startswith("regnet") else "meta"):
        network = build(f"torchvision/{arch}", 7)
        size = network.spec.image_size
        assert network(torch.empty(2, 3, size, size)).logits.shape == (2, 7)


def test_every_torchvision_network_has_a_view_and_weights():
    for arch in TORCHVISION:
        for offer in tv.published(arch):
            assert offer.num_classes == 1000 and offer.url.startswith("https://") and offer.file_name.endswith(".pth")
            assert 0.8 <= offer.view.crop_pct <= 1 and offer.view.interpolation in ("bilinear", "bicubic")
        assert tv.published(arch)[0].view == tv.view(arch)


@pytest.mark.parametrize(
    "arch", [*(f"efficientnet_b{k}" for k in range(8)), *(f"efficientnet_lite{k}" for k in range(5))]
)
def test_every_efficientnet_is_timms(arch):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours, theirs = build(arch, 1000), timm.create_model(f"tf_{arch}")
        assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    cfg = theirs.pretrained_cfg
    if arch[-5:] in ("lite3", "lite4"):  # the original has 280 and 300 px, bicubic; timm 300 and 380, bilinear
        return
    assert ours.spec.image_size == cfg["input_size"][1]
    assert ours.spec.crop_pct == pytest.approx(cfg["crop_pct"], abs=2e-3)
    assert ours.spec.interpolation == cfg["interpolation"] == "bicubic"


@pytest.mark.parametrize(
    ("arch", "size"), [("efficientnet_b0", 224), ("efficientnet_b1", 75), ("efficientnet_lite0", 130)]
)
def test_efficientnet_computes_what_timms_does(arch, size):
    """Also at sides that are odd at some stage, where the padding is not the one of the nominal size."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(f"tf_{arch}", num_classes=11).eval()
    ours = build(arch, 11).eval()
    for module in theirs.modules():  # as if trained: fresh statistics would hide a wrong epsilon
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
    values = theirs.state_dict().values()  # the same order, other names
    ours.net.load_state_dict(dict(zip(ours.net.state_dict(), values, strict=True)))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = theirs(images)
        distance = (ours(images).logits - expected).norm() / expected.norm()
    assert distance < 1e-5


def test_efficientnet_has_plain_parts_and_can_be_folded():
    from torch.fx.experimental.optimization import fuse

    network = build("efficientnet_b0", 10).eval()
    kinds = {type(m).__name__ for m in network.modules()}
    assert "SiLU" in kinds and "MemoryEfficientSwish" not in kinds
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(images).logits
        folded = fuse(network.net)
        assert torch.allclose(folded(images), expected, atol=1e-5)
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in n.modules()) for n in (network.net, folded)]
    assert norms == [49, 5]  # what stays follows the five convolutions with stride 2
    assert build("efficientnet_lite0", 10).net._blocks[3]._swish.__class__ is nn.ReLU6


def test_importing_efficientnet_pytorch_warns_of_nothing():
    code = "import dist_kd.models as m; m.build('efficientnet_b0', 10); m.build('efficientnet_lite0', 10)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize(("arch", "size"), [("googlenet", 64), ("inception_v3", 80)])
def test_auxiliary_heads_are_gone(arch, size):
    network = build(arch, 5).train()
    output = network(torch.randn(2, 3, size, size)).logits
    assert output.shape == (2, 5)
    output.sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []


def test_inception_is_normalized_in_the_view_instead_of_inside():
    torch.manual_seed(0)
    network = build("googlenet", 5).eval()
    pixels = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (network.spec.mean, network.spec.std))
    usual_mean, usual_std = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET)
    theirs = copy.deepcopy(network.net)
    theirs.transform_input = True
    for norm in (m for net in (network.net, theirs) for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.train()  # fresh running statistics would let the signal fade to nothing, and any two outputs agree
    with torch.no_grad():
        expected = theirs((pixels - usual_mean) / usual_std)
        distance, other = (
            (network((pixels - m) / s).logits - expected).norm() / expected.norm()
            for m, s in ((mean, std), (usual_mean, usual_std))
        )
    assert distance < 1e-4 < 1e-3 < other


@pytest.mark.parametrize("arch", ["cnn_small", "cnn_medium", "resnet18_cifar", "resnet34_cifar"])
@pytest.mark.parametrize("size", [8, 17, 32])
def test_cifar_networks_take_small_images(arch, size):
    network = build(arch, 10, image_size=size)
    assert network(torch.randn(2, 3, size, size)).logits.shape == (2, 10)
    assert network.spec.image_size == size and network.spec.crop_pct == 1.0


def test_random_weights_follow_the_callers_generator():
    def first(arch: str) -> torch.Tensor:
        torch.manual_seed(3)
        return torch.cat([p.flatten() for p in build(arch, 10).parameters()])

    for arch in ("cnn_small", "efficientnet_b0"):
        assert torch.equal(first(arch), first(arch))


def test_transformers_are_built_for_the_image_size():
    with torch.device("meta"):
        assert build("vit_b_16", 10, image_size=64)(torch.empty(1, 3, 64, 64)).logits.shape == (1, 10)
    with pytest.raises(ConfigError, match=r"`vit_b_16` \(--arch\) cannot be built for 50 px"):
        build("vit_b_16", 10, image_size=50)


def test_densenets_old_names_are_joined_and_auxiliary_heads_dropped():
    old = {
        "features.denseblock1.denselayer2.norm.1.weight": torch.ones(1),
        "features.denseblock1.denselayer2.conv.2.weight": torch.ones(1),
        "features.norm0.weight": torch.ones(1),
        "AuxLogits.fc.weight": torch.ones(1),
    }
    assert list(tv._repair(old)) == [
        "features.denseblock1.denselayer2.norm1.weight",
        "features.denseblock1.denselayer2.conv2.weight",
        "features.norm0.weight",
    ]


def test_resnet152_default_is_the_second_set():
    offers = tv.published("resnet152")
    assert [o.label for o in offers] == ["IMAGENET1K_V2", "IMAGENET1K_V1"]
    assert offers[0].view.crop_pct == pytest.approx(224 / 232) and offers[1].view.crop_pct == pytest.approx(224 / 256)
    assert [o.label for o in tv.published("vgg16")] == ["IMAGENET1K_V1"]  # not the headless features


class TestTimm:
    def test_builds_by_name_with_its_view(self):
        pytest.importorskip("timm")
        network = build("timm/mobilenetv3_small_050", 7)
        assert network(torch.randn(1, 3, 64, 64)).logits.shape == (1, 7)
        assert network.spec.interpolation == "bicubic" and network.spec.arch == "timm/mobilenetv3_small_050"

    def test_a_transformer_takes_the_image_size(self):
        pytest.importorskip("timm")
        network = build("timm/vit_tiny_patch16_224", 7, image_size=64)
        assert network(torch.randn(1, 3, 64, 64)).logits.shape == (1, 7)

    @pytest.mark.parametrize("name", ["resnet81", "resnet18.not_a_tag", "hf-hub:someone/something"])
    def test_a_miss_names_what_is_near(self, name):
        pytest.importorskip("timm")
        with pytest.raises(ConfigError, match=f"`timm/{name}` is not known to timm"):
            build(f"timm/{name}", 7)

    def test_its_absence_names_the_extra(self):
        # None in sys.modules is Python's own way of making an import fail
        code = "import sys; sys.modules['timm'] = None; import dist_kd.models as m; m.build('timm/resnet18', 10)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "ConfigError" in done.stderr and "pip install 'dist-kd[timm]'" in done.stderr


class TestNetwork:
    def test_taps_are_the_named_modules_outputs(self):
        network = build("cnn_small", 10, wants=frozenset({"3", "11"})).eval()
        images = torch.randn(2, 3, 16, 16)
        features = network(images).features
        assert network._kept == {}  # what it has given away it does not keep

        def head(count: int) -> torch.Tensor:
            return nn.Sequential(*list(network.net)[:count])(images)

        assert torch.equal(features["3"], head(4))
        assert torch.equal(features["11"], head(12))
        features["3"].sum().backward()
        assert network.net[0].weight.grad is not None

    def test_without_taps_there_are_no_hooks_or_features(self):
        network = build("cnn_small", 10)
        assert network(torch.randn(2, 3, 8, 8)).features == {}
        assert not any(m._forward_hooks for m in network.modules())

    def test_a_copy_taps_itself(self):
        network = build("cnn_small", 10, wants=frozenset({"3"})).eval()
        twin = copy.deepcopy(network)
        nn.init.zeros_(twin.net[0].weight)
        images = torch.randn(2, 3, 8, 8)
        before = network(images).features["3"]
        assert torch.equal(twin(images).features["3"], torch.zeros_like(before))
        assert torch.equal(network(images).features["3"], before) and before.abs().sum() > 0

    def test_an_unknown_tap_is_refused(self):
        with pytest.raises(ConfigError, match=r"`resnet18` has no feature `layer5` to tap; did you mean `layer"):
            build("resnet18", 10, wants=frozenset({"layer5"}))

    def test_a_tap_that_stays_silent_is_an_error(self):
        network = build("cnn_small", 10, wants=frozenset({"3"}))
        network.net[3]._forward_hooks.clear()
        with pytest.raises(RuntimeError, match=r"\['3'\] of cnn_small gave nothing"):
            network(torch.randn(2, 3, 8, 8))

    def test_works_under_ddp_and_as_one_graph(self, tmp_path):
        import torch.distributed as dist

        torch._dynamo.reset()
        network = build("efficientnet_b0", 10).eval()
        images = torch.randn(2, 3, 32, 32)
        whole = torch.compile(network, backend="eager", fullgraph=True)
        assert torch.equal(whole(images).logits, network(images).logits)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            for tapped in (frozenset(), frozenset({"3"})):
                wrapped = nn.parallel.DistributedDataParallel(build("cnn_small", 10, wants=tapped))
                output = wrapped(torch.randn(2, 3, 8, 8))
                output.logits.sum().backward()
                assert set(output.features) == tapped
        finally:
            dist.destroy_process_group()

    def test_the_spec_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            build("cnn_small", 10).spec.num_classes = 3
