"""Names: which network a name means, without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dist_kd.errors import ConfigError
from dist_kd.models import resolve
from dist_kd.models.names import CIFAR, EFFNET, ORIGINALS, TORCHVISION, split


@pytest.mark.parametrize(
    ("given", "canonical", "zoo"),
    [
        ("efficientnet_b0", "efficientnet_b0", "effnet"),
        ("efficientnet-b0", "efficientnet_b0", "effnet"),
        ("effnet/efficientnet-b7", "efficientnet_b7", "effnet"),
        ("EfficientNet-Lite0", "efficientnet_lite0", "effnet"),
        ("torchvision/efficientnet_b0", "torchvision/efficientnet_b0", "torchvision"),
        ("torchvision/resnet152", "resnet152", "torchvision"),
        ("resnet152", "resnet152", "torchvision"),
        ("resnet18_cifar", "resnet18_cifar", "cifar"),
        ("cnn-small", "cnn_small", "cifar"),
        ("WRN-16-2-CIFAR", "wrn_16_2_cifar", "cifar"),
        ("vgg13_cifar", "vgg13_cifar", "cifar"),
        ("vgg13", "vgg13", "torchvision"),
        ("residual-cnn", "residual_cnn", "originals"),
        ("timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k", "timm"),
    ],
)
def test_names_and_sources(given, canonical, zoo):
    assert resolve(given) == canonical
    assert resolve(canonical) == canonical
    assert split(canonical)[0] == zoo


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("resnet15", "`resnet152`"),
        ("resnet20", r"did you mean `resnet20_cifar`"),
        ("wrn40_2", "`wrn_40_2_cifar`"),
        ("vgg8", r"did you mean `vgg8_cifar`"),
        ("resnext29_32x8d", r"did you mean `resnext29_32x8d_cifar`"),
        ("efficientnet_b0_cifar10", "`efficientnet_b0_cifar`"),
        ("mobilenets", "`mobilenets_m`, `mobilenets_s`"),
        ("efficentnet_b0", "`efficientnet_b0`"),
        ("effnet/resnet18", "`efficientnet_b0`"),
        ("torchvision/cnn_small", "`torchvision`|is not known"),
        ("keras/resnet50", "`torchvision/`"),
        ("", "is not known"),
        ("timm/", "is not known"),
    ],
)
def test_a_miss_names_what_is_near(given, hint):
    with pytest.raises(ConfigError, match=hint) as caught:
        resolve(given)
    assert f"`{given}` (--arch)" in str(caught.value)


def test_the_static_list_is_torchvisions_own():
    import torchvision

    assert set(TORCHVISION) == set(torchvision.models.list_models(module=torchvision.models))


def test_the_static_list_of_small_networks_is_what_can_be_built():
    from dist_kd.models.cifar import WIDTHS
    from dist_kd.models.cifar_nets import MAKERS

    assert sorted(CIFAR) == sorted([*WIDTHS, *MAKERS])


def test_no_zoo_shadows_another_except_as_said():
    assert not {*CIFAR, *ORIGINALS} & {*EFFNET, *TORCHVISION} and not set(CIFAR) & set(ORIGINALS)
    assert set(EFFNET) & set(TORCHVISION) == {f"efficientnet_b{k}" for k in range(8)}


def test_names_are_resolved_without_torch():
    code = (
        "import sys; from dist_kd.models import resolve; resolve('efficientnet-b0');"
        "heavy = {'torch', 'torchvision', 'timm', 'numpy', 'efficientnet_pytorch'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
