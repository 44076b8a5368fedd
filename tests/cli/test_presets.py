"""Every file in configs/ parses, says where it comes from and stands in the table."""

from __future__ import annotations

import pytest

from dist_kd.cli.files import PRESETS, preset_names


def header(name: str) -> str:
    return "".join(x for x in (PRESETS / f"{name}.yaml").read_text().splitlines(True) if x.startswith("#"))


@pytest.mark.parametrize("name", preset_names())
def test_preset(parsed, name):
    config = parsed(f"--config {name} --data shards").config
    assert config.data == "shards"
    for word in ("command", "hardware", "time", "published", "ours", "twin"):
        assert f"# {word} " in header(name)
    assert f"--config {name}" in header(name)
    assert f"`{name}.yaml`" in (PRESETS / "README.md").read_text()


@pytest.mark.parametrize("name", [n for n in preset_names() if n.endswith(("_kd", "imagenet_dist"))])
def test_a_distilled_preset_differs_from_its_twin_in_the_teacher_only(parsed, name):
    distilled = parsed(f"--config {name} --data shards").config
    plain = parsed(f"--config {name.rpartition('_')[0]}_ce --data shards").config
    teacher = {"method", "method_args", "T", "w", "teacher_arch", "teacher_weights"}
    assert distilled.method == name.rpartition("_")[2] and plain.method == "ce"
    assert distilled.model_dump(exclude=teacher) == plain.model_dump(exclude=teacher)
