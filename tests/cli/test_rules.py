"""Settings that cannot go together, and flags without effect."""

from __future__ import annotations

import pytest

from dist_kd.cli import parse
from dist_kd.errors import ConfigError


@pytest.mark.parametrize(
    ("line", "key", "words"),
    [
        ("--T 4 --no-kd", "--T", "no effect with the method `ce` (flag --no-kd); leave out one of the two"),
        ("--T 4", "--T", "no effect with the method `ce` (default); add --kd"),
        ("--temperature 4 --method ce", "--temperature", "(flag --method)"),
        ("--w 0.5", "--w", "add --kd"),
        ("--teacher-arch resnet50", "--teacher-arch", "add --kd"),
        ("--teacher-weights none", "--teacher-weights", "add --kd"),
        ("--kd --no-kd", "--no-kd", "gives method `ce`, but --kd gives `kd`"),
        ("--kd --T 4 --temperature 5", "--temperature", "gives T `5.0`, but --T gives `4.0`"),
        ("--seed 1 --seed 2", "--seed", "gives seed `2`, but --seed gives `1`"),
        ("--epochs 3 --max-steps 10", "--epochs", "no effect beside --max-steps"),
        ("--epochs 3 --warmup-epochs 5", "--warmup-epochs", "as long as the whole training of 3"),
        ("--lr-step-epochs 5", "--lr-step-epochs", "unless with --schedule step or --schedule restarts"),
        ("--lr-gamma 0.5 --schedule constant", "--lr-gamma", "unless with --schedule step or --schedule restarts"),
        ("--lr-floor 0.5 --schedule step", "--lr-floor", "unless with --schedule cosine or --schedule restarts"),
        ("--schedule restarts --lr-gamma 0.5", "--lr-gamma", "use --lr-gamma 1 or 2"),
        ("--mixup 0.2 --device-batch-size 33", "--device-batch-size", "`33` must be even"),
        ("--cutmix 1 --batch-size 33", "--batch-size", "`33` must be even"),
        ("--wandb-project p", "--wandb-project", "without --wandb"),
        ("--allow-changes --resume never", "--allow-changes", "with --resume never"),
        ("--allow-reshard --resume never", "--allow-reshard", "with --resume never"),
        ("--workers 0 --loader-timeout 5", "--loader-timeout", "with --workers 0"),
        ("--cpu --mixed-precision fp16", "--mixed-precision", "fp16 needs a GPU"),
    ],
)
def test_contradictions_by_hand(problem, line, key, words):
    found = problem(line)
    assert found.startswith(f"{key}: ") and words in found


@pytest.mark.parametrize(
    "line",
    [
        "--kd --w 0.5 --T 1 --teacher-weights none --label-smoothing 0.1",
        "--label-smoothing 0.1",
        "--max-steps 4",
        "--schedule step --lr-step-epochs 2 --lr-gamma 0.2",
        "--schedule restarts",
        "--schedule restarts --lr-step-epochs 2 --lr-gamma 2 --lr-floor 0.1",
        "--mixup 0.2 --batch-size 64 --device-batch-size 2",
        "--wandb --wandb-project p",
        "--allow-changes",
        "--allow-reshard",
        "--cpu --mixed-precision bf16",
    ],
)
def test_no_contradiction(config, line):
    config(line)


def test_an_idle_value_of_a_file_is_tolerated(config, problem, write):
    path = write("kd: true\nT: 8\nteacher_arch: resnet50\nwarmup_epochs: 1\nwandb_project: p\n")
    plain = config(f"--config {path} --no-kd")
    assert (plain.method, plain.T) == ("ce", 8.0)
    assert "has no effect" in problem(f"--config {path} --no-kd --T 2")
    assert "must be" not in problem(f"--config {path} --epochs 0.5")  # but too long a warm-up stays wrong


def test_a_misunderstood_setting_raises_no_second_problem(problems):
    assert len(problems("--method kdd --T 4 --teacher-arch resnet50")) == 1
    assert len(problems("--schedule stp --lr-gamma 0.5")) == 1
    assert len(problems("--mixup x --batch-size 33")) == 1


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("http://me:hidden@host/set", "the URL of `host` carries a user name or a password"),
        ("/disk/a.tar,s3://b/c.tar?X-Amz-Signature=hidden", "carries a credential in its query"),
        ("pipe:cat hidden", "would run a command"),
        ("ssh://host/hidden-{0..1}.tar", "the scheme `ssh:`"),
    ],
)
def test_data_that_is_not_opened(where, words):
    """Refused before torch is there, and what is refused is in no message."""
    for line in (["--data", where], ["--data", "digits", "--val-data", where, "--print-config"]):
        with pytest.raises(ConfigError) as caught:
            parse(line, {})
        assert words in str(caught.value) and "hidden" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        parse(["--data", "digits"], {"DIST_KD_DATA": where})
    assert words in str(caught.value) and "variable DIST_KD_DATA" in str(caught.value)


def test_a_password_in_the_wrong_place_is_not_repeated(problem):
    assert problem(["https://me:hidden@host/set"]).startswith("`https://host/set`: is no flag")


def test_remote_data_makes_the_loader_wait():
    line = "--data https://host/set --workers 0 --loader-timeout 5"
    assert parse(line.split(), {}).config.loader_timeout == 5
