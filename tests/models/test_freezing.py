"""A frozen backbone stays the function it was; what is left to train is the head."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_kd.errors import ConfigError
from dist_kd.models import build, freeze_backbone
from dist_kd.models.freezing import head_of

HEADS = {
    "resnet20_cifar": "fc",
    "cnn_small": "14",
    "efficientnet_b0": "_fc",
    "mobilenet_v2": "classifier.1",
    "squeezenet1_0": "classifier.1",
    "vit_b_16": "heads.head",
    "vgg19_bn": "classifier.6",
    "residual_cnn": "classifier.2",
    "mobilenets_m": "classifier.1",
    "densenet121": "classifier",
    "timm/resnet18": "fc",
    "timm/mobilenetv3_small_050": "classifier",
}


@pytest.mark.parametrize("arch", HEADS)
def test_the_head_is_found(arch):
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    with torch.device("meta"):
        network = build(arch, 64)  # as wide as some layers before
    assert head_of(network) == HEADS[arch]
    frozen = freeze_backbone(network)
    named = dict(network.named_parameters())
    assert {n for n, p in named.items() if not p.requires_grad} == set(frozen)
    left = {n for n, p in named.items() if p.requires_grad}
    assert left and all(n.startswith(f"net.{HEADS[arch]}.") for n in left)


def test_a_network_without_a_head_is_refused():
    network = build("cnn_small", 10)
    network.net[14] = nn.Identity()
    with pytest.raises(ConfigError, match="`cnn_small` has no single layer that makes its 10 logits"):
        freeze_backbone(network)


def step(network, module=None) -> None:
    images = torch.randn(6, 3, 32, 32)
    loss = nn.functional.cross_entropy((module or network)(images).logits, torch.arange(6))
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    loss.backward()
    optimizer.step()


def changed(network, before) -> set[str]:
    now = network.state_dict()
    return {k for k in now if not torch.equal(now[k], before[k]) and "num_batches" not in k}


@pytest.mark.parametrize("arch", ["resnet8x4_cifar", "mobilenet_v2_cifar", "efficientnet_b0", "cnn_norm_last"])
class TestTraining:
    def test_only_the_head_moves(self, arch):
        network = build(arch, 10).train()
        with torch.no_grad():
            for _ in range(20):  # with fresh statistics a deep network's features fade to nothing
                network(torch.randn(6, 3, 32, 32))
        frozen = freeze_backbone(network)
        before = copy.deepcopy(network.state_dict())
        network.eval()
        network.train()  # what the loop does after each evaluation
        step(network)
        assert changed(network, before) == {n for n, p in network.named_parameters() if p.requires_grad}
        assert all(dict(network.named_parameters())[name].grad is None for name in frozen)
        assert network.training and not any(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))

    def test_norms_follow_the_data_if_asked(self, arch):
        network = build(arch, 10).train()
        freeze_backbone(network, train_norms=True)
        before = copy.deepcopy(network.state_dict())
        step(network)
        moved = changed(network, before)
        learned = {n for n, p in network.named_parameters() if p.requires_grad}
        assert moved - learned and all("running" in name for name in moved - learned)
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(m.training for m in norms)
        network.eval()
        assert not any(m.training for m in norms)


def test_dropout_of_the_backbone_rests_and_the_heads_goes_on():
    network = build("efficientnet_b0_cifar", 10).train()
    freeze_backbone(network)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.net.features(images), network.net.features(images))  # no stochastic depth
        assert not torch.equal(network(images).logits, network(images).logits)  # the head's own dropout


def test_a_copy_is_frozen_alike():
    network = build("resnet8x4_cifar", 10)
    freeze_backbone(network)
    twin = copy.deepcopy(network).train()
    assert twin.training and not twin.net.bn1.training and not twin.net.layer1[0].bn1.training


def test_data_parallel_training_goes_on(tmp_path):
    """It stops at parameters that want a gradient and get none; frozen ones want none."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = build("resnet8x4_cifar", 10, wants=frozenset({"stage2"})).train()
        freeze_backbone(network)
        wrapped = nn.parallel.DistributedDataParallel(network).train()
        for _ in range(3):
            step(network, wrapped)
        assert not network.net.bn1.training
    finally:
        dist.destroy_process_group()
