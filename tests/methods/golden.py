"""The batch on which losses have known values, and how a test calls a method by name."""

import torch

from dist_kd.contracts import Batch, ModelOutput
from dist_kd.methods import build_method

S = torch.tensor([[1, 2, 0, -1], [0.5, -0.5, 3, 1], [2, 0, 1, -2]], dtype=torch.float64)
T = torch.tensor([[2, 3, -1, 0], [0, 1, 4, -1], [0.5, 2.5, 0, 1]], dtype=torch.float64)
Y = torch.tensor([1, 2, 0])
CE = 0.360380736646713  # of S with Y, by an independent program


def batch(labels=Y, weights=None, soft=None):
    n = labels.shape[0]
    return Batch(torch.zeros(n, 3, 1, 1), labels, torch.ones(n) if weights is None else weights, torch.arange(n), soft)


def out(logits, **features):
    return ModelOutput(logits, features)


def run(name, student=S, teacher=T, rows=None, **settings):
    """LossTerms of the method `name`; settings of several methods as {"dkd.b": 2}."""
    return build_method(name, **settings)(out(student), out(teacher), rows or batch())


def large(rows=64, classes=10, dtype=torch.float64):
    """Logits of student and teacher, and labels, drawn."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: 3 * torch.randn(rows, classes, generator=generator, dtype=dtype)  # noqa: E731
    return draw(), draw(), torch.randint(classes, (rows,), generator=generator)
