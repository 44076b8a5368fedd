"""Which networks there are and which zoo builds each: names only, so that a command line needs no torch for them."""

from __future__ import annotations

import difflib

from dist_kd.errors import ConfigError

# static, because importing torchvision takes seconds; a test compares it with torchvision's own list
_TORCHVISION = """
alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161 densenet169
densenet201 efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5
efficientnet_b6 efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet inception_v3
maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small
regnet_x_16gf regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf
regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf
regnet_y_8gf resnet101 resnet152 resnet18 resnet34 resnet50 resnext101_32x8d resnext101_64x4d resnext50_32x4d
shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b
swin_s swin_t swin_v2_b swin_v2_s swin_v2_t vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16
vit_b_32 vit_h_14 vit_l_16 vit_l_32 wide_resnet101_2 wide_resnet50_2
"""
TORCHVISION: tuple[str, ...] = tuple(_TORCHVISION.split())
EFFNET: tuple[str, ...] = tuple([f"efficientnet_b{k}" for k in range(8)] + [f"efficientnet_lite{k}" for k in range(5)])
# for 32 pixels, with a stem that keeps the side, if they end in _cifar; the plain CNNs take any side from 8 on
_CIFAR = """
cnn_small cnn_medium densenet40_cifar efficientnet_b0_cifar mobilenet_v2_cifar resnet110_cifar resnet152_cifar
resnet18_cifar resnet20_cifar resnet32_cifar resnet32x4_cifar resnet34_cifar resnet50_cifar resnet56_cifar
resnet8x4_cifar resnext29_2x64d_cifar resnext29_32x4d_cifar resnext29_32x8d_cifar vgg13_cifar vgg19_bn_cifar vgg8_cifar
wrn_16_2_cifar wrn_40_1_cifar wrn_40_2_cifar
"""
CIFAR: tuple[str, ...] = tuple(_CIFAR.split())
# what the four projects built themselves, named after what is special about it
ORIGINALS: tuple[str, ...] = (
    "resnet18_fine",
    "residual_cnn",
    "residual_cnn_folded",
    "vgg19_bn_tiled",
    "cnn_norm_last",
    "mobilenets_m",
    "mobilenets_s",
)

# bare names are looked up in this order: efficientnet_b0 means effnet's, not torchvision's
ZOOS: dict[str, tuple[str, ...]] = {
    "effnet": EFFNET,
    "cifar": CIFAR,
    "originals": ORIGINALS,
    "torchvision": TORCHVISION,
}
FORCED = ("torchvision", "effnet", "timm")  # prefixes a user may write

# role -> the flags that name the network and its weights, for error messages
ROLES: dict[str, tuple[str, str]] = {
    "student": ("--arch", "--student-weights"),
    "teacher": ("--teacher-arch", "--teacher-weights"),
    "model": ("ARCH", "--weights"),
}


def close(name: str, known: tuple[str, ...] | list[str], count: int = 5) -> str:
    """`did you mean ...?` with up to `count` names near `name`, or a sample of what there is."""
    longer = sorted((n for n in known if name and n.startswith(name)), key=len)  # `resnet20` means `resnet20_cifar`
    near = list(dict.fromkeys(longer + difflib.get_close_matches(name, known, n=count, cutoff=0.6)))[:count]
    if near:
        return "did you mean " + ", ".join(f"`{n}`" for n in near) + "?"
    return "there are, among others, " + ", ".join(f"`{n}`" for n in list(known)[:count])


def resolve(arch: str, flag: str = "--arch") -> str:
    """The canonical name of a network: `efficientnet-b0` -> `efficientnet_b0`; ConfigError with close names for a miss.

    A prefix forces a source: `torchvision/efficientnet_b0`, `effnet/efficientnet_b0`, `timm/NAME`. It stays in the
    canonical name only where the bare name would mean another source. timm's names are checked when it is built.
    """
    source, _, name = arch.strip().partition("/") if "/" in arch else ("", "", arch.strip())
    if source == "timm" and name:
        return f"timm/{name}"
    name = name.replace("-", "_").lower()
    if source and source not in FORCED:
        raise ConfigError(
            f"network `{arch}` ({flag}) has the prefix `{source}/`, which must be one of "
            + ", ".join(f"`{p}/`" for p in FORCED)
        )
    for zoo in [source] if source else ZOOS:
        if name in ZOOS.get(zoo, ()):
            bare_means_it = next(z for z in ZOOS if name in ZOOS[z]) == zoo
            return name if bare_means_it else f"{zoo}/{name}"
    known = ZOOS[source] if source in ZOOS else [n for names in ZOOS.values() for n in names]
    raise ConfigError(f"network `{arch}` ({flag}) is not known; {close(name, known)} (`timm/NAME` takes timm's names)")


def split(arch: str) -> tuple[str, str]:
    """Zoo and the name inside it, of a canonical name."""
    zoo, _, name = arch.partition("/") if "/" in arch else ("", "", arch)
    return zoo or next(z for z in ZOOS if name in ZOOS[z]), name
