"""argv: spellings, and one clear line for each wrong word."""

from __future__ import annotations

import pytest

from dist_kd.cli.names import FIELDS, LONG, SHORT, aliases, nearest
from dist_kd.config import Config

CARD = "--arch efficientnet_b0 --teacher-arch resnet152 --kd --T 4 --w 0.9 --save_path runs/exp --data shards"


def test_the_design_cards_line(parsed):
    config, origins = parsed(CARD)
    assert (config.arch, config.teacher_arch, config.method) == ("efficientnet_b0", "resnet152", "kd")
    assert (config.T, config.w, config.save_path, config.data) == (4.0, 0.9, "runs/exp", "shards")
    assert origins["T"] == "flag --T" and origins["method"] == "flag --kd" and origins["lr"] == "default"
    assert list(origins) == list(Config.model_fields)


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("--kd --teacher_arch resnet50", "teacher_arch", "resnet50"),
        ("--kd --teacher-arch=resnet50", "teacher_arch", "resnet50"),
        ("--kd --kd-model-name resnet50", "teacher_arch", "resnet50"),
        ("--kd --kd_temperature 2", "T", 2.0),
        ("-a resnet18", "arch", "resnet18"),
        ("-a=resnet18", "arch", "resnet18"),
        ("-b 64", "batch_size", 64),
        ("-j 0", "workers", 0),
        ("-o here", "save_path", "here"),
        ("--output here", "save_path", "here"),
        ("--arch efficientnet-b0", "arch", "efficientnet_b0"),  # one canonical name, hence one run
        ("--augment flip+crop", "augment", "crop+flip"),
        ("--augment none", "augment", "none"),
        ("--lr 1e-3", "lr", 0.001),
        ("--lr none", "lr", None),
        ("--no-kd", "method", "ce"),
        ("--method kd", "method", "kd"),
        ("--wandb", "wandb", True),
        ("--no-wandb", "wandb", False),
        ("--no_channels_last", "channels_last", False),
        ("--in-memory", "in_memory", True),
        ("--no-in-memory", "in_memory", False),
        ("--torchcompile", "compile", True),
        ("--mixed-precision no", "mixed_precision", "no"),
        ("--kd --T 4 --T 4.0", "T", 4.0),  # twice, but the same
    ],
)
def test_spellings(config, line, field, value):
    assert getattr(config(line), field) == value


def test_every_alias_reaches_its_field_and_no_other():
    spelled = [alias for name in FIELDS for alias in [*aliases(name), "--" + name]]
    normal = [s.replace("-", "_") for s in spelled]
    assert len(set(normal)) == len(normal)
    for name in FIELDS:
        for alias in aliases(name):
            assert (LONG | SHORT)[alias if alias in SHORT else alias[2:].replace("-", "_")] == name


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--kd --t 3", "--t: no such flag, got `3` (flag --t); did you mean --T?"),
        ("--kd --W 3", "--W: no such flag, got `3` (flag --W); did you mean --w?"),
        ("--arhc resnet18", "--arhc: no such flag, got `resnet18` (flag --arhc); did you mean --arch?"),
        ("--kd --teach resnet18", "--teach: no such flag, got `resnet18` (flag --teach); did you mean --teacher-arch?"),
        ("--confg x", "--confg: no such flag, got `x` (flag --confg); did you mean --config?"),
        ("--zzzzzz", "--zzzzzz: no such flag (flag --zzzzzz); see --help"),
        ("-j8", "-j8: no such flag (flag -j8); write `-j 8`"),
        ("--no-epochs", "--no-epochs: no such flag (flag --no-epochs); --epochs is no yes-or-no setting"),
        ("--kd=true", "--kd: takes no value, got `true` (flag --kd); write --kd"),
        ("--kd False", "--kd: takes no value, got `False` (flag --kd); write --no-kd"),
        ("--no-wandb=true", "--no-wandb: takes no value, got `true` (flag --no-wandb); write --no-wandb"),
        ("--no-kd=false", "--no-kd: takes no value, got `false` (flag --no-kd); write --kd"),
        ("--epochs", "--epochs: needs a value, but what follows is the end of the line (flag --epochs)"),
        ("--seed --kd", "--seed: needs a value, but what follows is the next flag, `--kd` (flag --seed)"),
        ("--config", "--config: needs a preset's name or a YAML file, but what follows is the end of the line"),
        ("resnet18", "`resnet18`: is no flag, and no flag before it takes it; see --help"),
        ("--kd --w 1.5", "--w: must be at most 1, got `1.5` (flag --w)"),
        ("--kd --w -0.1", "--w: must be at least 0, got `-0.1` (flag --w)"),
        ("--kd --T=0", "--T: must be greater than 0, got `0` (flag --T)"),
        ("--label-smoothing 1", "--label-smoothing: must be less than 1, got `1` (flag --label-smoothing)"),
        ("--epochs inf", "--epochs: must be a finite number, got `inf` (flag --epochs)"),
        ("--lr nan", "--lr: must be"),
        ("--batch-size 2.5", "--batch-size: must be a whole number, got `2.5` (flag --batch-size)"),
        ("--batch-size none", "--batch-size: must be a whole number"),
        ("--epochs ten", "--epochs: must be a number, got `ten` (flag --epochs)"),
        ("--save_path=", "--save_path: must be a text, and cannot be empty, got `` (flag --save_path)"),
        (
            "--optimizer adm",
            "--optimizer: must be one of sgd, adam, amsgrad, adamw, rmsprop, got `adm` (flag --optimizer); did you",
        ),
        ("--arch resnet19", "--arch: network `resnet19` (flag --arch) is not known; did you mean"),
        ("--augment crop+flp", "--augment: augmentation `flp` in `crop+flp` is unknown; did you mean `flip`"),
        (
            "--method kdd",
            "--method: there is no such method; did you mean kd?, got `kdd` (flag --method); choose from ce, kd",
        ),
    ],
)
def test_one_wrong_word_gives_one_clear_line(problem, line, text):
    found = problem(line)
    assert found.startswith(text)
    assert "pydantic" not in found and "http" not in found


def test_a_secret_is_refused_and_not_repeated(problem):
    found = problem("--wandb-api-key abc123")
    assert "secret" in found and "abc123" not in found


def test_all_problems_are_told_at_once(problems, write):
    path = write("w: 2\nepoch: 3\n")
    found = problems(f"--config {path} --t 3 --batch-size x --kd=yes --arch resnet19 --schedule step --lr-floor 0.1")
    assert [line.split(":")[0] for line in found] == [
        "--t", "--kd", "epoch", "w", "--batch-size", "--arch", "--lr-floor"
    ]  # fmt: skip


def test_a_value_is_shown_short_and_on_one_line(problem):
    found = problem(["--optimizer", "a\nb" + "x" * 500])
    assert "a\\nbxx" in found and len(found) < 250


def test_nearest():
    assert nearest("t", ["w", "T"]) == "T"
    assert nearest("teacher", ["arch", "teacher_arch"]) == "teacher_arch"
    assert nearest("bach_size", ["batch_size", "base"]) == "batch_size"
    assert nearest("ARCH", ["arch_x", "arch"]) == "arch"
    assert nearest("qqq", ["arch"]) is None
