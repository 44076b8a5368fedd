"""Two small networks with stages for the methods that look at features, and how a test builds and calls a loss."""

import torch
from torch import nn
from torch.nn import functional as F

from dist_kd.contracts import Batch, ModelOutput, NetworkSpec
from dist_kd.methods import build_method
from dist_kd.methods.frame import Pair

FEATURE_METHODS = ["fitnet", "attention", "rkd", "crd", "overhaul", "reviewkd"]
SAMPLES = 40  # in the set that batches are said to come from


class Toy(nn.Module):
    """images [B, 3, 8, 8] -> logits and taps, without a batch norm of its own in the way: rows do not meet in it."""

    def __init__(self, *widths, side=8, name="toy"):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in zip((3, *widths), widths, strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.norms.requires_grad_(False)  # they are only asked for margins: DDP would miss their gradients
        self.head = nn.Linear(widths[-1], 5)
        self.side = side
        self.spec = NetworkSpec(name, 5, (0.5,) * 3, (0.5,) * 3, side, 1.0, "bilinear")
        n = range(1, len(widths) + 1)
        self.taps = dict.fromkeys([f"stage{k}" for k in n] + [f"pre_relu{k}" for k in n] + ["pooled"])

    def forward(self, images):
        found, maps = {}, images
        for k, conv in enumerate(self.convs, 1):
            maps = conv(maps)
            found[f"pre_relu{k}"] = maps
            maps = found[f"stage{k}"] = F.relu(maps)
        found["pooled"] = maps.mean(dim=(2, 3))
        return ModelOutput(self.head(found["pooled"]), found)

    def shapes(self, names):
        with torch.no_grad():
            features = self(torch.zeros(1, 3, self.side, self.side)).features
        return {name: tuple(features[name].shape[1:]) for name in names}

    def margin_norms(self):
        return {f"pre_relu{k}": norm for k, norm in enumerate(self.norms, 1)}


def networks(student=(4, 6, 5), teacher=(4, 8, 10), dtype=torch.float32):
    """A student and a frozen teacher, always the same."""
    torch.manual_seed(0)
    ours, theirs = Toy(*student, name="small").to(dtype), Toy(*teacher, name="large").to(dtype)
    for norm in theirs.norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return ours, theirs.eval().requires_grad_(False)


def pair_of(student, teacher, batch_size=8, train_samples=SAMPLES):
    return Pair(student, teacher, num_classes=5, train_samples=train_samples, batch_size=batch_size)


def loss_of(name, student, teacher, batch_size=8, **settings):
    """The loss over these networks; as in a run, what it draws is drawn under a seed of its own."""
    state = {p: p.dtype for p in student.parameters()}.popitem()[1]
    torch.manual_seed(1)
    if "crd" in name.split("+"):
        settings = {"crd.negatives": 12} | settings
    return build_method(name, pair_of(student.float(), teacher.float(), batch_size), **settings).to(state)


def rows(n=8, first=0, dtype=torch.float32, weights=None):
    """Rows first..first + n of one endless batch of noise."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(64, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)[first : first + n]
    samples = (torch.arange(64) * 7 % SAMPLES)[first : first + n]
    weights = torch.ones(n, dtype=dtype) if weights is None else weights
    return Batch(images, torch.arange(first, first + n) % 5, weights, samples)
