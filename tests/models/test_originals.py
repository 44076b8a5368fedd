"""Our definitions against the programs they come from: logits of equal weights, ImageNet weights, exact folding."""

from __future__ import annotations

import pytest
import torch
import torchvision
from models.wave_weights import logits
from torch import nn

from dist_kd import compression
from dist_kd.errors import ConfigError
from dist_kd.models import build, fold_affine_head, foldable, load, save_student
from dist_kd.models import torchvision_zoo as tv

# found by running the programs themselves: HobbitLong/RepDistiller for the first six, then the third, first and
# fourth of the four projects
GOLDEN = {
    "resnet20_cifar": (0.7586868431585836, 0.6743900539542886, 0.6326442436764905),
    "resnet8x4_cifar": (0.700833201367308, 0.836441749727923, 0.9981636158723933),
    "wrn_16_2_cifar": (0.6806109451725411, 1.1359079975222033, 1.1941296042565699),
    "wrn_40_1_cifar": (2.909314276817727, 3.9691696434147827, 4.290696021805134),
    "vgg8_cifar": (1.3846528132006386, 1.3531657092234268, 1.036964312190208),
    "vgg13_cifar": (3.5405694124112905, 0.050306684183927364, -2.6778248061469507),
    "resnext29_32x4d_cifar": (-1.4435947188473652, 1.0030438804694422, 3.331514145261608),
    "resnext29_2x64d_cifar": (-1.3952076600924705, 0.9200869902596767, 3.234341101515726),
    "densenet40_cifar": (0.7048794297406049, 1.1511543515375426, 1.0329397546534582),
    "efficientnet_b0_cifar": (1.685255096617008, 0.792046052438417, 0.5793616960637955),
    "residual_cnn": (1.2403189981417804, 1.1269469518632502, 0.8110309609211375),  # for a side of 12: a head of 7 x 7
    "mobilenets_m": (0.8917759286311957, 0.8196833656149622, 0.8408693249031505),
    "mobilenets_s": (0.8873033631978197, 0.8916820334471152, 0.9496309115366746),
}


@pytest.mark.parametrize("arch", GOLDEN)
def test_computes_what_the_original_does(arch):
    size = {"residual_cnn": 12, "mobilenets_m": 64, "mobilenets_s": 64}.get(arch, 32)
    net = build(arch, 10, image_size=size).net
    # the first project defines its shortcuts after everything else; the sort is stable
    late = {name: arch == "residual_cnn" and "shortcut" in name for name, _ in net.named_parameters()}
    parameters = [p for _, p in sorted(net.named_parameters(), key=lambda item: late[item[0]])]
    found = logits(net, parameters, size)
    assert torch.allclose(found, torch.tensor(GOLDEN[arch], dtype=torch.float64), rtol=1e-9)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


class TestResnet18Fine:
    def test_takes_imagenets_weights_after_the_surgery(self, hub):
        torch.manual_seed(0)
        theirs = torchvision.models.resnet18(weights=None).state_dict()
        torch.save(theirs, hub / tv.published("resnet18")[0].file_name)
        network = build("resnet18_fine", 10, "DEFAULT")
        assert network.notes == ("head 1000 -> 10 classes, fresh",)
        own = network.net.state_dict()
        assert list(own) == list(theirs)
        assert all(torch.equal(own[k], v) for k, v in theirs.items() if not k.startswith("fc."))
        assert network.spec.image_size == 32 and network.spec.std == (0.2023, 0.1994, 0.2010)

    def test_maps_are_as_the_project_prints_them(self):
        with torch.device("meta"):
            network = build("resnet18_fine", 10)
        shapes = network.shapes(["conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"])
        assert shapes == {
            "conv1": (64, 32, 32), "maxpool": (64, 16, 16), "layer1": (64, 16, 16), "layer2": (128, 16, 16),
            "layer3": (256, 8, 8), "layer4": (512, 8, 8),
        }  # fmt: skip


def trained_residual_cnn(side: int = 32):
    torch.manual_seed(4)
    network = build("residual_cnn", 10, image_size=side)
    norm = network.net.classifier[1]
    nn.init.uniform_(norm.weight, -2.0, 2.0)
    nn.init.normal_(norm.bias)
    for _ in range(3):
        network.train()(torch.randn(4, 3, side, side))
    return network.eval()


class TestFolding:
    def test_is_exact_and_fifty_times_smaller(self):
        network = trained_residual_cnn()
        before = {k: v.clone() for k, v in network.state_dict().items()}
        folded = fold_affine_head(network)
        images = torch.randn(4, 3, 32, 32)
        with torch.no_grad():
            expected, found = network(images).logits, folded(images).logits
        assert (found - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())
        head = sum(p.numel() for p in folded.net.classifier.parameters())
        assert head == 933_130 and sum(p.numel() for p in folded.parameters()) == 1_038_474
        assert compression.sizes(folded, 32)["parameters"] == 1_038_474
        # the folded one is a copy with its own storage
        folded.net.stage1.conv.weight.data.zero_()
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
        assert not folded.training

    def test_the_copy_is_a_student_of_its_own(self, tmp_path):
        folded = fold_affine_head(trained_residual_cnn(12))
        assert folded.spec.arch == "residual_cnn_folded" and "pooled" in folded.taps
        save_student(folded, tmp_path / "student", classes=tuple("abcdefghij"), card="", extra={})
        images = torch.randn(2, 3, 12, 12)
        with torch.no_grad():
            assert torch.equal(load(tmp_path / "student")(images).logits, folded(images).logits)

    def test_a_student_that_gave_features_leaves_its_hooks_behind(self):
        network = build("residual_cnn", 10, image_size=12, wants=frozenset({"stage2", "pooled"})).eval()
        network.net.compile(backend="eager")
        folded = fold_affine_head(network)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in folded.modules())
        assert folded.net._compiled_call_impl is None and not folded(torch.randn(2, 3, 12, 12)).features

    def test_others_have_nothing_to_fold(self):
        assert foldable(build("residual_cnn", 10, image_size=12))
        for other in (build("cnn_small", 10), build("residual_cnn_folded", 10), nn.Linear(3, 3)):
            assert not foldable(other)
        with pytest.raises(ConfigError, match="`cnn_small` has no affine head to fold"):
            fold_affine_head(build("cnn_small", 10))

    def test_its_norm_refuses_a_training_batch_of_one(self):
        with pytest.raises(ValueError, match="more than 1 value"):
            build("residual_cnn", 10).train()(torch.randn(1, 3, 32, 32))


def test_tiled_vgg_is_the_plain_one_with_its_head_spread_over_49_copies():
    torch.manual_seed(0)
    tiled, plain = build("vgg19_bn_tiled", 10).eval(), build("vgg19_bn_cifar", 10).eval()
    plain.net.features.load_state_dict(tiled.net.features.state_dict())
    with torch.no_grad():
        plain.net.classifier.weight.copy_(tiled.net.classifier.weight.view(10, 512, 49).sum(2))
        plain.net.classifier.bias.copy_(tiled.net.classifier.bias)
        images = torch.randn(2, 3, 32, 32)
        expected, found = tiled(images).logits, plain(images).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_norms_come_last_in_the_second_projects_cnn():
    kinds = [type(layer).__name__ for layer in build("cnn_norm_last", 10).net]
    assert kinds == ["Conv2d", "ReLU", "MaxPool2d", "BatchNorm2d"] * 3 + ["Flatten", "Linear"]


def test_each_project_sees_images_as_it_did():
    with torch.device("meta"):
        specs = {arch: build(arch, 10).spec for arch in ("residual_cnn", "cnn_norm_last", "mobilenets_m")}
    assert specs["residual_cnn"].std == (0.2023, 0.1994, 0.2010)
    assert specs["cnn_norm_last"].mean == (0.485, 0.456, 0.406)
    assert specs["mobilenets_m"].mean == (0.5, 0.5, 0.5) and specs["mobilenets_m"].image_size == 224
    assert {spec.crop_pct for spec in specs.values()} == {1.0}


@pytest.mark.parametrize(("arch", "size"), [("residual_cnn", 20), ("cnn_norm_last", 28), ("mobilenets_s", 144)])
def test_other_sides(arch, size):
    with torch.device("meta"):
        assert build(arch, 5, image_size=size)(torch.empty(2, 3, size, size)).logits.shape == (2, 5)
