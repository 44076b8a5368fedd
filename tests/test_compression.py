"""Sizes against hand counts and other libraries' published figures; latency in bounded time."""

from __future__ import annotations

import json
import time

import pytest
import torch
import torchvision
from torch import nn

from dist_kd.commands import compress
from dist_kd.compression import REPEATS, compare, latencies, measure, sizes, table
from dist_kd.errors import ConfigError
from dist_kd.models import build


class Tiny(nn.Module):
    """3 -> 4 channels, depthwise, norm, pooled, linear: small enough to count by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, images):
        return self.head(torch.relu(self.norm(self.depthwise(self.conv(images)))).mean((2, 3)))


def test_sizes_by_hand():
    found = sizes(Tiny(), 8)
    parameters = (3 * 4 * 9 + 4) + 4 * 9 + (4 + 4) + (4 * 5 + 5)
    buffers = 4 + 4 + 1
    macs = 64 * 3 * 4 * 9 + 16 * 4 * 9 + 4 * 5  # each of the depthwise channels sees one channel
    activations = 4 * 64 + 4 * 16 + 4 * 16 + 5
    assert found == {
        "parameters": parameters,
        "buffers": buffers,
        "state_dict_bytes": 4 * (parameters + 8) + 8,  # the batch norm's counter is one int64
        "dtype": "float32",
        "image_size": 8,
        "flops": 2 * macs,
        "activations": activations,
        "size_original": parameters + activations,
    }
    assert sizes(Tiny().half(), 8)["state_dict_bytes"] == 2 * (parameters + 8) + 8


def test_the_published_pair():
    """Multiply-adds: 11.51 G and 0.386 G; one table calls parameters + activations the size: 104.4 M and 20.7 M."""
    with torch.device("meta"):
        result = compare(build("resnet152", 1000), build("efficientnet_b0", 1000), 224, latency=False)
    teacher, student = result["teacher"], result["student"]
    assert (teacher["parameters"], student["parameters"]) == (60_192_808, 5_288_548)
    assert teacher["flops"] / 1e9 == pytest.approx(23.03, abs=0.005)
    assert 0.77 <= student["flops"] / 1e9 <= 0.80
    assert 102.5 <= teacher["size_original"] / 1e6 <= 105.4 and 18.5 <= student["size_original"] / 1e6 <= 21.3
    assert result["ratio_percent"]["parameters"] == pytest.approx(8.79, abs=0.005)
    assert result["compression"]["parameters"] == pytest.approx(11.38, abs=0.005)
    assert teacher["state_dict_bytes"] == pytest.approx(241.4e6, rel=1e-3)
    assert result["published_size"] == (104.4, 20.7) and "104.4 M -> 20.7 M (19.83 %)" in result["note"]


def test_the_published_pair_at_32_pixels_is_only_half_reproduced():
    """Teacher 72 M as published; the student's 6.6 M is no count of ours, and the note gives what ours is."""
    with torch.device("meta"):
        result = compare(build("resnet152_cifar", 10), build("efficientnet_b0_cifar", 10), 32, latency=False)
    ours = [result[side]["size_original"] / 1e6 for side in ("teacher", "student")]
    assert ours == [pytest.approx(72.0, abs=0.6), pytest.approx(4.7, abs=0.05)]
    assert "as 72 M -> 6.6 M (9.17 %)" in result["note"] and "here these are 72.5 M -> 4.7 M (6.48 %)" in result["note"]


def test_a_student_that_folds_is_measured_folded_too():
    with torch.device("meta"):
        teacher, student = build("resnet18_fine", 10), build("residual_cnn", 10)
        result = compare(teacher, student, 32, latency=False)
        alone = compare(None, student, 32, latency=False)
    folded = result["folded"]
    assert (result["student"]["parameters"], folded["parameters"]) == (46_767_854, 1_038_474)
    # three norms of 32, 64 and 128 channels: mean and variance, and a counter of 8 bytes each
    assert folded["state_dict_bytes"] == 4 * (1_038_474 + 2 * (32 + 64 + 128)) + 3 * 8
    saved = 2 * (93_312 * 500 + 500 * 10 - 93_312 * 10)
    assert folded["flops"] == result["student"]["flops"] - saved
    assert folded["ratio_percent"]["parameters"] == pytest.approx(100 * 1_038_474 / 11_181_642, abs=1e-3)
    for text in (
        "residual_cnn_folded: parameters 1,038,474 (9.29 % of the teacher's)",
        "state dict 4.16 MB",
        "FLOPs, one",
    ):
        assert text in table(result)
    assert "1,038,474 (2.22 % of the student's)" in table(alone)
    assert "folded" not in compare(teacher, teacher, 32, latency=False)
    json.dumps(result)


@pytest.mark.parametrize(
    "arch", ["resnet18", "mobilenet_v2", "vit_b_16", "swin_t", "convnext_tiny", "shufflenet_v2_x1_0"]
)
def test_flops_are_twice_torchvisions_multiply_adds(arch):
    published = torchvision.models.get_model_weights(arch).DEFAULT.meta["_ops"]
    with torch.device("meta"):
        found = sizes(build(arch, 1000), 224)["flops"] / 2e9
    assert found == pytest.approx(published, rel=0.01, abs=0.0006)  # theirs is rounded to three decimals


def test_activations_do_not_depend_on_who_wrote_the_network():
    with torch.device("meta"):
        ours, theirs = (sizes(build(f"{zoo}/efficientnet_b0", 1000), 224) for zoo in ("effnet", "torchvision"))
    assert ours["activations"] == theirs["activations"] == 13_485_732


def test_the_network_stays_as_it_was():
    network = build("cnn_small", 10)
    network.net[2].eval()
    modes = [m.training for m in network.modules()]
    before = {k: v.clone() for k, v in network.state_dict().items()}
    generator = torch.get_rng_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        measure(network, 16, seconds=0.05, threads=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(m._forward_hooks for m in network.modules())
    assert torch.equal(torch.get_rng_state(), generator)


def test_latency_of_both_in_turn():
    seconds = 1.0  # a busy machine stands still for less
    result = compare(build("cnn_medium", 10), build("cnn_small", 10), 32, seconds=seconds)
    for side in ("teacher", "student"):
        found = result[side]
        assert set(found["latency_ms"]) == {"1", "32"}
        for batch, median in found["latency_ms"].items():
            assert 0 < median <= found["latency_p95_ms"][batch]
            assert REPEATS[0] <= found["latency_repeats"][batch] <= REPEATS[1]
        assert found["latency_ms"]["32"] > found["latency_ms"]["1"]
    assert result["teacher"]["latency_ms"]["32"] > result["student"]["latency_ms"]["32"]
    assert result["compression"]["latency_ms_32"] > 1
    assert result["threads"] == 1 and result["cpu"]


class Sleepy(nn.Module):
    """Takes 20 ms an image, as a large network would."""

    def forward(self, images):
        time.sleep(0.02 * len(images))
        return images.mean((2, 3))


def test_a_batch_too_slow_is_left_out_and_time_is_bounded():
    start = time.monotonic()
    (found,) = latencies([Sleepy()], [8], seconds=0.3)
    assert time.monotonic() - start < 1.5
    assert found["latency_ms"]["1"] == pytest.approx(20, rel=0.3) and found["latency_repeats"]["1"] < 20
    assert found["latency_ms"]["32"] is None and found["latency_repeats"]["32"] == 0


def test_a_null_is_shown_and_is_no_ratio():
    result = compare(Sleepy(), Sleepy(), 8, seconds=0.3)
    assert result["compression"]["latency_ms_32"] is None and result["compression"]["parameters"] is None
    line = next(line for line in table(result).splitlines() if line.startswith("CPU latency, batch 32, median"))
    assert line.split()[-4:] == ["-"] * 4


def test_table_is_aligned_and_names_units():
    result = compare(build("cnn_medium", 10), build("cnn_small", 10), 32, seconds=0.02)
    assert json.loads(json.dumps(result)) == result
    lines = table(result).splitlines()
    assert len({len(line) for line in lines[:8] if not line.startswith("-")}) == 1  # one right edge
    text = table(result)
    for part in (
        "217,338",
        "24,346",
        "11.20 %",
        "8.93 x",
        "MB",
        "MFLOP",
        "ms",
        "2 x multiply-adds",
        "cnn_small (32 px)",
    ):
        assert part in text
    alone = table({"student": measure(build("cnn_small", 10), 32, seconds=0.02)})
    assert "24,346" in alone and "smaller by" not in alone
    assert compare(None, build("cnn_small", 10), 32, latency=False).keys() == {"student", "definitions", "note"}


def test_the_command(capsys):
    words = ["--arch", "cnn-small", "--teacher-arch", "efficientnet_b0", "--num-classes", "10", "--image-size", "32"]
    assert compress.main([*words, "--no-latency", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["student"]["parameters"] == 24_346 and result["teacher"]["parameters"] == 4_020_358
    assert compress.main(["--arch", "cnn_small", "--teacher-arch", "none", "--seconds", "0.05"]) == 0
    assert "CPU latency, batch 1, median" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"`resnet15` \(--teacher-arch\)"):
        compress.main(["--teacher-arch", "resnet15"])
    with pytest.raises(ConfigError, match="--num-classes is `0`, but must be at least 1"):
        compress.main(["--num-classes", "0"])
