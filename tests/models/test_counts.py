"""Parameters and multiply-adds of every network by name, against the papers and programs that define it."""

from __future__ import annotations

import pytest
import torch

from dist_kd import compression
from dist_kd.models import build
from dist_kd.models.names import CIFAR, ORIGINALS

# NETWORK, classes, parameters, source. A, B, C, D: counted in the code of the four projects. RepDistiller: counted in
# HobbitLong/RepDistiller, whose definitions the distillation literature uses (it rounds 278,324 to 0.28 M).
PARAMETERS = [
    ("resnet152", 1000, 60_192_808, "torchvision"),
    ("resnet34", 10, 21_289_802, "B's other teacher"),
    ("efficientnet_b0", 1000, 5_288_548, "torchvision, and C"),
    ("efficientnet_b7", 1000, 66_347_960, "torchvision"),
    ("torchvision/efficientnet_b0", 1000, 5_288_548, "torchvision"),
    ("efficientnet_lite0", 1000, 4_652_008, "timm"),
    ("mobilenet_v2", 1000, 3_504_872, "torchvision"),
    ("mobilenet_v2", 101, 2_353_253, "D"),
    ("mobilenet_v2", 257, 2_553_089, "D"),
    ("cnn_small", 10, 24_346, "3x3x3x16 + 16x32x9 + 32x64x9 + 2x(16+32+64) + 64x10 + 10"),
    ("cnn_medium", 10, 217_338, "3x16x9 + 16x48x9 + 48x96x9 + 96x192x9 + 2x(16+48+96+192) + 192x10 + 10"),
    ("resnet18_cifar", 10, 11_173_962, "kuangliu/pytorch-cifar"),
    ("resnet34_cifar", 10, 21_282_122, "kuangliu/pytorch-cifar"),
    ("resnet50_cifar", 10, 23_520_842, "kuangliu/pytorch-cifar"),
    ("resnet152_cifar", 10, 58_156_618, "C"),
    ("resnext29_2x64d_cifar", 10, 9_128_778, "C"),
    ("resnext29_32x4d_cifar", 10, 4_774_218, "C"),
    ("resnext29_32x8d_cifar", 10, 18_976_074, "C"),
    ("densenet40_cifar", 10, 1_068_658 - 9_360, "C, without its 9,360 masks, which no gradient reaches"),
    ("efficientnet_b0_cifar", 10, 3_599_686 - 1_088, "C, without its first block's unused convolution and norm"),
    ("mobilenet_v2_cifar", 10, 2_236_682, "torchvision's with 10 classes: strides only; chenyaofo's 2.24 M"),
    ("vgg19_bn_cifar", 10, 20_040_522, "RepDistiller"),
    ("resnet20_cifar", 100, 278_324, "RepDistiller"),
    ("resnet32_cifar", 100, 472_756, "RepDistiller"),
    ("resnet56_cifar", 100, 861_620, "RepDistiller"),
    ("resnet110_cifar", 100, 1_736_564, "RepDistiller"),
    ("resnet8x4_cifar", 100, 1_233_540, "RepDistiller"),
    ("resnet32x4_cifar", 100, 7_433_860, "RepDistiller"),
    ("wrn_16_2_cifar", 100, 703_284, "RepDistiller"),
    ("wrn_40_1_cifar", 100, 569_780, "RepDistiller"),
    ("wrn_40_2_cifar", 100, 2_255_156, "RepDistiller"),
    ("vgg8_cifar", 100, 3_965_028, "RepDistiller"),
    ("vgg13_cifar", 100, 9_462_180, "RepDistiller"),
    ("resnet18_fine", 10, 11_181_642, "A"),
    ("residual_cnn", 10, 46_767_854, "A"),
    ("residual_cnn_folded", 10, 46_767_854 - (93_312 * 500 + 500 + 1_000 + 5_010) + 933_130, "A's, its head folded"),
    ("vgg19_bn_tiled", 10, 20_286_282, "B"),
    ("cnn_norm_last", 10, 114_186, "B"),
    ("mobilenets_m", 101, 1_500_901, "D"),
    ("mobilenets_m", 257, 1_700_737, "D"),
    ("mobilenets_s", 101, 1_023_909, "D"),
]

# millions for one image of the network's own size, and the rounding of the source
MULTIPLY_ADDS = [
    ("resnet18_fine", 10, 852.7, 0.05),
    ("residual_cnn", 10, 130.4, 0.05),
    ("vgg19_bn_tiled", 10, 398.4, 0.05),
    ("cnn_norm_last", 10, 10.3, 0.05),
    ("efficientnet_b0_cifar", 10, 30.3, 0.05),
    ("resnet152_cifar", 10, 3_720.0, 5.0),
    ("mobilenets_m", 101, 176.6, 0.05),
    ("mobilenet_v2", 101, 299.6, 0.05),
    ("resnet152", 1000, 11_500.0, 50.0),
    ("efficientnet_b0", 1000, 386.0, 0.5),
]


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("arch", "classes", "count", "source"), PARAMETERS)
def test_parameters(arch, classes, count, source):
    with torch.device("meta"):  # shapes only
        assert parameters(build(arch, classes)) == count, source


def test_no_network_of_ours_goes_uncounted():
    assert {*CIFAR, *ORIGINALS} <= {row[0] for row in PARAMETERS}


@pytest.mark.parametrize(("arch", "classes", "millions", "rounding"), MULTIPLY_ADDS)
def test_multiply_adds(arch, classes, millions, rounding):
    with torch.device("meta"):
        network = build(arch, classes)
    found = compression.sizes(network, network.spec.image_size)["flops"] / 2e6
    assert abs(found - millions) <= rounding


def test_mobilenets_m_layer_by_layer():
    with torch.device("meta"):
        net = build("mobilenets_m", 101).net
    found = [parameters(layer) for layer in net.features]
    assert found == [
        928, 1472, 2928, 4752, 5536, 7872, 7872, 12032, 28032, 28032, 28032, 36288, 60480, 60480, 85184, 162240, 162240,
        264960, 412160,
    ]  # fmt: skip
    assert parameters(net.classifier) == 129_381
