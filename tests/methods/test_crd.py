"""crd: the critic against the published program, the draw of negatives, the memories by hand."""

import math

import numpy as np
import pytest
import torch
from methods.feature_nets import SAMPLES, loss_of, networks, rows
from torch.nn import functional as F

from dist_kd.errors import ConfigError
from dist_kd.methods import build_method
from dist_kd.methods.crd import critic_loss, draw_negatives, products
from dist_kd.methods.frame import Pair


def published(logits, mean, samples):
    """Noise-contrastive loss as published, with Z = mean * samples and noise 1 / samples, in numpy."""
    p = np.exp(logits) / (mean * samples)
    count = logits.shape[1] - 1
    noise = count / samples
    return -np.log(p[:, 0] / (p[:, 0] + noise)) - np.log(noise / (p[:, 1:] + noise)).sum(axis=1)


def test_equals_the_published_program_whatever_the_size_of_the_set():
    logits = 4 * torch.randn(5, 1 + 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = logits.exp().mean()
    for samples in (10, 50000):
        expected = published(logits.numpy(), mean.item(), samples)
        assert critic_loss(logits, mean.log()).tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_limits():
    flat = torch.zeros(2, 1 + 20, dtype=torch.float64)  # nothing told apart
    expected = math.log(21) + 20 * math.log(1 + 1 / 20)
    assert critic_loss(flat, torch.zeros(()).double()).tolist() == pytest.approx([expected] * 2)
    known = torch.tensor([[60.0] + [-60.0] * 20], dtype=torch.float64)
    assert critic_loss(known, torch.zeros(()).double()).item() < 1e-20
    wrong = torch.tensor([[-200.0] + [200.0] * 20])
    assert critic_loss(wrong, torch.zeros(())).item() == pytest.approx(200 + 20 * 200, rel=0.02)


def test_gradcheck():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: critic_loss(x, torch.tensor(0.3).double()), (logits,))


def test_negatives_are_other_samples_each_once():
    key, samples = torch.tensor(123), torch.tensor([0, 7, 99, 50])
    for count, total in ((99, 100), (33, 100), (1, 100), (1, 2)):
        drawn = draw_negatives(key, torch.tensor(5), samples % total, count, total)
        assert drawn.shape == (4, count)
        for sample, others in zip((samples % total).tolist(), drawn.tolist(), strict=True):
            assert len(set(others)) == count and sample not in others
            assert min(others) >= 0 and max(others) < total


def test_negatives_follow_from_seed_step_and_sample_alone():
    draw = lambda key, step, *samples: draw_negatives(  # noqa: E731
        torch.tensor(key), torch.tensor(step), torch.tensor(samples), 8, 1000
    )
    whole = draw(1, 2, 10, 20, 30)
    assert torch.equal(draw(1, 2, 30)[0], whole[2])  # not from the row's place
    for other in (draw(2, 2, 10), draw(1, 3, 10), draw(1, 2, 20)):
        shift = {(a - b) % 1000 for a, b in zip(other[0].tolist(), whole[0].tolist(), strict=True)}
        assert len(shift) > 1  # another draw, not the same one turned
    # splitmix64 by hand: https://prng.di.unimi.it/splitmix64.c, in Python's integers
    mask = 2**64 - 1

    def mixed(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    state = mixed(mixed(1 + 2 + 1) ^ (10 + 1))
    words = [mixed((state + k * 0x9E3779B97F4A7C15) & mask) & (2**63 - 1) for k in range(1, 10)]
    edges = [k * 999 // 8 for k in range(9)]
    places = [low + word % (high - low) for low, high, word in zip(edges, edges[1:], words[1:], strict=False)]
    assert whole[0].tolist() == [(10 + 1 + (place + words[0]) % 999) % 1000 for place in places]


def test_every_other_sample_is_equally_likely():
    drawn = draw_negatives(torch.tensor(9), torch.tensor(0), torch.arange(30_000), 3, 30_000)
    offset = (drawn - torch.arange(30_000)[:, None]) % 30_000
    counts = torch.histc(offset.double(), 10, 1, 29_999)
    assert ((counts - 9000).abs() < 5 * 9000**0.5).all(), counts


@pytest.mark.parametrize("samples", [10, 1000])  # all products and a choice, or copies of the chosen
def test_products_by_hand(samples):
    generator = torch.Generator().manual_seed(0)
    rows_, bank = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (3, samples))
    chosen = torch.tensor([[0, 9, 1], [5, 5, 2], [9, 0, 3]])
    expected = [[float(row @ bank[k]) for k in ks] for row, ks in zip(rows_, chosen.tolist(), strict=True)]
    assert torch.allclose(products(rows_, bank, chosen), torch.tensor(expected).double())
    assert torch.autograd.gradcheck(lambda x: products(x, bank, chosen), (rows_.requires_grad_(),))


def built(**settings):
    student, teacher = networks()
    return student, teacher, loss_of("crd", student, teacher, **settings)


def test_one_step_by_hand():
    """Embeddings, logits against the other's memory, the means that are kept, and what both memories become."""
    student, teacher, loss = built()
    term, b = loss.terms["crd"], rows()
    before = {name: value.clone() for name, value in term.named_buffers()}
    ours, theirs = student(b.images), teacher(b.images)
    weights = torch.ones(8)
    weights[3] = 0
    b = b._replace(weights=weights)
    found = loss(ours, theirs, b).parts["loss_crd"].item()
    e_s = F.normalize(term.embed_student(ours.features["pooled"]), dim=1).detach()
    e_t = F.normalize(term.embed_teacher(theirs.features["pooled"]), dim=1).detach()
    negatives = draw_negatives(before["key"], torch.tensor(0), b.samples, 12, SAMPLES)
    expected, means = torch.zeros(8), []
    for rows_, bank in ((e_s, before["bank_teacher"]), (e_t, before["bank_student"])):
        picked = bank[torch.cat([b.samples[:, None], negatives], 1)]  # [8, 13, 128]
        logits = torch.einsum("bd,bkd->bk", rows_, picked) / 0.07
        means.append(logits[weights > 0].exp().mean().item())
        expected += torch.tensor(published(logits.double().numpy(), means[-1], SAMPLES))
    assert found == pytest.approx((expected * weights).sum().item() / 8, rel=1e-5)
    assert term.log_means.exp().tolist() == pytest.approx(means, rel=1e-5)
    for name, rows_ in (("bank_student", e_s), ("bank_teacher", e_t)):
        bank = before[name]
        for sample, row, weight in zip(b.samples.tolist(), rows_, weights.tolist(), strict=True):
            if weight:  # a damaged sample's memory stays
                bank[sample] = F.normalize(0.5 * bank[sample] + 0.5 * row, dim=0)
        assert torch.allclose(getattr(term, name), bank, atol=1e-6)
    assert term.rows_seen == 8


def test_the_means_are_kept_and_the_draw_goes_on():
    student, teacher, loss = built()
    term = loss.terms["crd"]
    loss(student(rows().images), teacher(rows().images), rows())
    means = term.log_means.clone()
    loss(student(rows(8, 8).images), teacher(rows(8, 8).images), rows(8, 8))
    assert torch.equal(term.log_means, means) and term.rows_seen == 16
    loss.eval()
    banks = term.bank_student.clone()
    loss(student(rows().images), teacher(rows().images), rows())
    assert torch.equal(term.bank_student, banks) and term.rows_seen == 16


def test_a_first_batch_of_bad_rows_decides_nothing():
    student, teacher, loss = built()
    b = rows(weights=torch.zeros(8))
    terms = loss(student(b.images), teacher(b.images), b)
    assert terms.parts["loss_crd"] == 0 and terms.total == 0
    assert loss.terms["crd"].log_means.isnan().all()
    assert loss(student(b.images), teacher(b.images), rows()).total.isfinite()


def test_as_many_negatives_as_there_are_and_what_that_costs():
    student, teacher, loss = built(**{"crd.negatives": 16384})
    assert loss.terms["crd"].count == SAMPLES - 1 and f"{SAMPLES - 1} negatives" in loss.formula
    assert "two memories of 40 x 128 numbers: 0.0 MB" in loss.notes[0]
    big = build_method("crd", Pair(student, teacher, train_samples=50_000, batch_size=8))
    assert (
        "50,000 x 128 numbers: 51.2 MB" in big.notes[0]
        and "0.4 MB for each row" in big.notes[0]
        and loss.coupled == ("crd",)
    )
    state = loss.state_dict()
    assert {f"terms.crd.{n}" for n in ("bank_student", "bank_teacher", "log_means", "key", "rows_seen")} < set(state)
    with pytest.raises(ConfigError, match="the training set has `1`"):
        build_method("crd", Pair(student, teacher, train_samples=1))
