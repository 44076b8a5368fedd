"""Contrastive distillation: Tian et al. 2019, arXiv 1910.10699 (CRD), with a memory of every sample's embeddings.

Exact over the micro-batches of all processes that run together, whose rows all memories take in; so they stay equal.
Negatives are other samples of whatever class, a function of (seed, step, sample).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_kd.contracts import Batch, ModelOutput
from dist_kd.errors import ConfigError
from dist_kd.methods import frame
from dist_kd.methods.ce import in_full_precision, weighted_mean
from dist_kd.methods.ranks import rows_of_all_ranks, sum_over_ranks, world_size

WIDTH = 128  # of the embeddings


@in_full_precision
def critic_loss(logits: Tensor, log_mean: Tensor) -> Tensor:
    """How badly a critic tells a row's partner (column 0) from its K negatives: [B, 1 + K] -> [B].

    A logit is the inner product of two embeddings over the temperature. The critic says `partner` with probability
    p / (p + K), p = exp(logit) / exp(log_mean), where log_mean stands for a mean over the set: the paper's
    normalization, in which the number of samples cancels. If nothing is told apart, log(K + 1) + K log(1 + 1 / K).
    """
    evidence = logits - log_mean - math.log(logits.shape[1] - 1)
    return F.softplus(-evidence[:, 0]) + F.softplus(evidence[:, 1:]).sum(dim=1)


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's finalizer over int64 words, whose products wrap as meant; the sign is shifted in, and masked off."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z


def draw_negatives(key: Tensor, step: Tensor, samples: Tensor, count: int, total: int) -> Tensor:
    """Numbers of `count` other samples for each of `samples`, [B] -> [B, count], below `total`, all different.

    One from each of `count` equal stretches of the circle of the others, which is turned anew for each row: each is
    as likely as any other. A function of (key, step, sample) alone; count is at most total - 1.
    """
    others = total - 1
    state = _mixed(_mixed(key + step + 1) ^ (samples + 1))  # [B]
    number = torch.arange(count + 1, device=samples.device)
    words = _mixed(state[:, None] + (number + 1) * -0x61C8864680B583EB) & (2**63 - 1)  # [B, 1 + count]
    starts = number * others // count
    inside = starts[:-1] + words[:, 1:] % (starts[1:] - starts[:-1])
    return (samples[:, None] + 1 + (inside + words[:, :1] % others) % others) % total


def products(rows: Tensor, bank: Tensor, chosen: Tensor) -> Tensor:
    """Inner products of each row with its chosen rows of the bank: [B, D], [N, D], [B, 1 + K] -> [B, 1 + K]."""
    if bank.shape[0] <= chosen.shape[1] * bank.shape[1]:  # [B, N] with all is smaller than copies [B, 1 + K, D]
        return (rows @ bank.T).gather(1, chosen)
    return torch.einsum("bd,bkd->bk", rows, bank[chosen])


class Term(frame.Term):
    """ce * CE + weight * (critic's loss of the student's embeddings + of the teacher's)."""

    coupled = True

    def __init__(
        self, pair: frame.Pair, weight: float, negatives: int, temperature: float, momentum: float, ce: float
    ) -> None:
        total = pair.train_samples
        if total < 2:
            raise ConfigError(f"--method `crd` tells samples apart, and the training set has `{total}`; it needs two")
        count = min(negatives, total - 1)
        formula = f"{weight:g} * NCE of student and teacher embeddings, {count} negatives at T={temperature:g}"
        super().__init__(formula, {"loss_crd": weight}, ce=ce)
        self.student_taps = self.teacher_taps = frozenset(["pooled"])
        self.count, self.total, self.batch_size = count, total, pair.batch_size
        self.sharpness, self.momentum = temperature, momentum  # not `temperature`: that is of the logits
        widths = (network.shapes(["pooled"])["pooled"][0] for network in (pair.student, pair.teacher))
        self.embed_student, self.embed_teacher = (nn.Linear(width, WIDTH) for width in widths)
        self.register_buffer("key", torch.randint(2**62, ()))
        self.register_buffer("rows_seen", torch.zeros((), dtype=torch.int64))  # by all processes
        limit = math.sqrt(3 / WIDTH)  # rows of length about 1
        for name in ("bank_student", "bank_teacher"):
            self.register_buffer(name, torch.empty(total, WIDTH).uniform_(-limit, limit))
        # means of exp(logit), student's and teacher's, estimated on the first rows and kept, as published
        self.register_buffer("log_means", torch.full((2,), math.nan))
        self.notes.append(
            f"crd keeps two memories of {total:,} x {WIDTH} numbers: {2 * total * WIDTH * 4 / 1e6:,.1f} MB on each "
            "device and in each checkpoint; during a step as much again, and about "
            f"{8 * min(total, (count + 1) * WIDTH) / 1e6:,.1f} MB for each row of a micro-batch"
        )

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        ours = F.normalize(self.embed_student(student.features["pooled"]), dim=1)
        theirs = F.normalize(self.embed_teacher(teacher.features["pooled"]), dim=1)
        step = self.rows_seen // self.batch_size
        negatives = draw_negatives(self.key, step, batch.samples, self.count, self.total)
        chosen = torch.cat([batch.samples[:, None], negatives], dim=1)
        logits = [
            products(rows, bank, chosen) / self.sharpness
            for rows, bank in ((ours, self.bank_teacher), (theirs, self.bank_student))
        ]
        means = self._means([each.detach() for each in logits], batch.weights)
        per_sample = sum(critic_loss(each, mean) for each, mean in zip(logits, means, strict=True))
        if self.training:
            self._remember(ours.detach(), theirs.detach(), batch)
        return {"loss_crd": weighted_mean(per_sample, batch)}

    @torch.no_grad()
    def _means(self, logits: list[Tensor], weights: Tensor) -> Tensor:
        """log_means, which the first good rows of all processes decide in training."""
        w = weights.to(logits[0].dtype)
        sums = torch.stack([*((w * each.exp().mean(dim=1)).sum() for each in logits), w.sum()])
        sums = sum_over_ranks(sums)
        good = (sums[2] > 0) & sums.isfinite().all()
        found = torch.where(good, sums[:2] / sums[2].clamp_min(1), 1.0).log()
        unknown = self.log_means.isnan()
        if self.training:
            self.log_means.copy_(torch.where(unknown & good, found, self.log_means))
        return torch.where(unknown, found, self.log_means)

    @torch.no_grad()
    def _remember(self, ours: Tensor, theirs: Tensor, batch: Batch) -> None:
        """Moves the rows of all processes' good samples in both memories. Each sample is once in a global batch."""
        samples = rows_of_all_ranks(batch.samples)
        good = rows_of_all_ranks(batch.weights)[:, None] > 0
        for name, rows in (("bank_student", ours), ("bank_teacher", theirs)):
            bank = getattr(self, name)
            old = bank[samples]
            new = F.normalize(self.momentum * old + (1 - self.momentum) * rows_of_all_ranks(rows), dim=1)
            kept = good & new.isfinite().all(dim=1, keepdim=True)  # what is not finite would come back as a negative
            # a new tensor: backward still needs the old one
            setattr(self, name, bank.index_copy(0, samples, torch.where(kept, new, old).to(bank.dtype)))
        self.rows_seen += batch.weights.shape[0] * world_size()
