"""Every file in configs/ parses, says where it comes from, stands in the table and has its plain twin."""

from __future__ import annotations

import re

import pytest

from dist_kd.cli.files import PRESETS, preset_names
from dist_kd.methods import needs_teacher

KINDS = ("_as_published", "_better")
TEACHER = {"method", "method_args", "T", "w", "teacher_arch", "teacher_weights"}


def header(name: str) -> str:
    lines = (x for x in (PRESETS / f"{name}.yaml").read_text().splitlines() if x.startswith("#"))
    return " ".join(line[1:].strip() if line.startswith("#  ") else line for line in lines)


def settings(parsed, line: str, exclude: set[str] = frozenset()) -> dict:
    return parsed(f"{line} --data shards").config.model_dump(exclude=exclude)


@pytest.mark.parametrize("name", preset_names())
def test_preset(parsed, name):
    config = parsed(f"--config {name} --data shards").config
    assert config.data == "shards"
    for word in ("command", "hardware", "time", "published", "ours", "twin"):
        assert f"# {word} " in header(name)
    assert f"--config {name} " in header(name)
    stage = name.removesuffix(KINDS[0]).removesuffix(KINDS[1])
    assert f"`{stage}`" in (PRESETS / "README.md").read_text()


@pytest.mark.parametrize("name", preset_names())
def test_a_run_that_a_preset_reads_is_made_by_the_preset_of_its_name(parsed, name):
    config = parsed(f"--config {name} --data shards").config
    for weights, arch in ((config.student_weights, config.arch), (config.teacher_weights, config.teacher_arch)):
        if weights.startswith("runs/"):
            maker = parsed(f"--config {weights.removeprefix('runs/')} --data shards").config
            assert (maker.save_path, maker.arch) == (weights, arch)


@pytest.mark.parametrize("name", preset_names())
def test_no_kd_is_the_plain_twin(parsed, name):
    config = parsed(f"--config {name} --data shards").config
    if not needs_teacher(config.method):
        assert config.method == "ce"
        return
    twin = f"--config {name} --no-kd"
    assert parsed(f"{twin} --data shards").config.method == "ce"
    idle = {"method", "method_args"}  # settings of a method that is not there are dropped
    assert settings(parsed, twin, idle) == settings(parsed, f"--config {name}", idle)
    assert "--no-kd on this file" in header(name)
    for file in re.findall(r"on this file, which is (\w+)\.yaml", header(name)):
        assert settings(parsed, twin, TEACHER) == settings(parsed, f"--config {file}", TEACHER)


@pytest.mark.parametrize("name", [n.removesuffix(KINDS[0]) for n in preset_names() if n.endswith(KINDS[0])])
def test_better_takes_no_more_epochs_than_published(parsed, name):
    better = f"{name}_better" if f"{name}_better" in preset_names() else "imagenet_dist"
    published = parsed(f"--config {name}_as_published --data shards").config
    ours = parsed(f"--config {better} --data shards").config
    assert ours.epochs <= published.epochs
    assert (ours.image_size, ours.method == "ce") == (published.image_size, published.method == "ce")
