"""YAML files, the order of layers, and settings written back."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_kd import cli
from dist_kd.cli import config_yaml, parse
from dist_kd.cli.names import FIELDS
from dist_kd.config import Config
from dist_kd.errors import ConfigError


def test_order_of_layers(parsed, write):
    a, b = write("T: 2\nw: 0.1\nkd: yes\ndata: a\n"), write("T: 3\n", "b.yaml")
    config, origins = parsed(f"--config {a} --config={b} --w 0.7", DIST_KD_DATA="v")
    assert (config.T, config.w, config.method, config.data) == (3.0, 0.7, "kd", "a")
    assert (origins["T"], origins["w"], origins["method"]) == (f"file {b}", "flag --w", f"file {a}")
    assert parsed(f"--config {b} --config {a}").config.T == 2.0


def test_data_variable(parsed):
    config, origins = parsed("", DIST_KD_DATA="shards")
    assert (config.data, origins["data"]) == ("shards", "variable DIST_KD_DATA")
    assert parsed("--data digits", DIST_KD_DATA="shards").config.data == "digits"


def test_missing_data_names_three_ways_and_the_embedded_set(parsed):
    with pytest.raises(ConfigError) as caught:
        parsed("", DIST_KD_DATA="")
    assert str(caught.value) == cli.explain_missing_data()
    for word in ("--data", "`data: ...` in a --config file", "DIST_KD_DATA", "--data digits"):
        assert word in str(caught.value)
    assert parse([], {}, require_data=False).config.data is None


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("lr: 1e-3", "lr", 0.001),
        ("lr: null", "lr", None),
        ("lr:", "lr", None),
        ("weight-decay: 1e-5", "weight_decay", 1e-5),
        ("mixed_precision: no", "mixed_precision", "no"),  # YAML 1.1 would say False
        ("batch_size: 010", "batch_size", 10),  # and 8
        ("wandb: yes", "wandb", True),
        ("wandb: false", "wandb", False),
        ("kd: true", "method", "kd"),
        ("kd: no", "method", "ce"),
        ("temperature: 5", "T", 5.0),
        ("augment: none", "augment", "none"),
        ("save_path: '1e3'", "save_path", "1e3"),
        ("save_path: 'null'", "save_path", "null"),
        ("save_path: 2026-01-01", "save_path", "2026-01-01"),  # YAML 1.1 would make a date
        ("# nothing", "lr", None),
    ],
)
def test_yaml_values(config, write, text, field, value):
    assert getattr(config(f"--config {write(text)}"), field) == value


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("lr: 1\nlr: 1", "lr: is given twice, in lines 1 and 2; keep one (file "),
        ("kd: true\nmethod: ce", "method: gives method `ce`, but kd gives `kd` (file "),
        ("archh: resnet18", "archh: no such setting, got `resnet18` (file "),
        ("optim:\n  lr: 1", "optim: must be one value, got a nested mapping; settings are flat (file "),
        ("data: [a, b]", "data: must be one value, got a list; settings are flat (file "),
        ("lr: !!python/object/apply:os.system ['touch gone']", "lr: must be one value, got a list"),
        (
            "lr: !!python/name:os.system x",
            "lr: must be a plain value, got the tag `tag:yaml.org,2002:python/name:os.sys",
        ),
        ("batch_size: true", "batch_size: must be a whole number, got `true` (file "),
        ("batch_size: 0", "batch_size: must be at least 1, got `0` (file "),
        ("batch_size:", "batch_size: must be a whole number, and cannot be left empty, got `null` (file "),
        ("kd: maybe", "kd: must be true or false, got `maybe` (file "),
        ("time_limit: 1:30", "time_limit: must be a number, got `1:30` (file "),  # YAML 1.1 would say 90
        ("wandb: 3", "wandb: must be true or false, got `3` (file "),
    ],
)
def test_yaml_problems(problem, write, text, start):
    path = write(text)
    found = problem(f"--config {path}")
    assert found.startswith(start) and f"file {path}, line " in found
    assert not Path("gone").exists()


def test_unreadable_files(problem, write, tmp_path):
    for text in ("a: [", "a: b: c", "- a", "just words", "a: 1\n---\nb: 2"):
        assert problem(f"--config {write(text)}").startswith(f"{tmp_path / 'a.yaml'}: ")
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in problem(f"--config {tmp_path / 'bin.yaml'}")
    (tmp_path / "config.yaml").write_text("")
    assert f"such as {tmp_path / 'config.yaml'}" in problem(f"--config {tmp_path}")
    assert "is not a file" in problem("--config nowhere.yaml")


def test_a_preset_missed_lists_close_names(problem):
    found = problem("--config cifar10_kdd")
    assert "did you mean cifar10_kd?" in found and "imagenet_ce" in found


def test_a_later_limit_in_epochs_replaces_one_in_steps(config, write):
    steps = write("max_steps: 5\nepochs: 7\n")  # as a saved config holds both
    assert config(f"--config {steps}").max_steps == 5
    both = config(f"--config {steps} --epochs 2")
    assert (both.epochs, both.max_steps) == (2.0, None)
    assert config(f"--config {steps} --epochs 2 --config {steps}").max_steps is None  # flags stand above files


def test_printed_config_is_a_config(parsed, write, capsys):
    line = "--data digits --kd --T 8 --lr 1e-5 --save_path runs/no#1 --clip-norm 1 --mixed-precision no --no-compile"
    first = parsed(line)
    text = config_yaml(first)
    assert "T: 8.0  # flag --T\n" in text and "seed: 0  # default\n" in text
    again = parsed(f"--config {write(text)}")
    assert again.config == first.config
    assert set(again.origins.values()) == {f"file {write(text)}"}
    with pytest.raises(SystemExit) as left:
        parsed(line + " --print-config")
    assert left.value.code == 0 and capsys.readouterr().out == text


def test_an_origin_cannot_break_its_comment():
    origins = dict.fromkeys(FIELDS, "default") | {"seed": "file a\nseed: 7"}
    text = config_yaml(cli.Parsed(Config(), origins))
    assert "seed: 0  # file a\\nseed: 7\n" in text
