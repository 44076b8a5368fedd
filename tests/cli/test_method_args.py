"""Settings of methods, sums of methods and several teachers: on the command line, in files, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from dist_kd.cli import config_yaml, parse
from dist_kd.methods import METHODS


@pytest.mark.parametrize(
    ("line", "method", "args"),
    [
        ("--method dkd", "dkd", ""),
        ("--method dkd --method-arg b=2", "dkd", "dkd.b=2.0"),
        ("--method dkd --method_arg b=2 --method-arg T=1", "dkd", "dkd.T=1.0,dkd.b=2.0"),
        ("--method dkd --method-args b=2,T=1", "dkd", "dkd.T=1.0,dkd.b=2.0"),
        ("--method dkd --method-arg dkd.b=8", "dkd", ""),  # the default: the same run
        ("--kd --method-arg standardize=yes", "kd", "kd.standardize=true"),
        ("--method dist+kd --method-arg g=0.5 --method-arg dist.T=4", "kd+dist", "dist.T=4.0,dist.g=0.5"),
        ("--method hard --method-arg w=0.25", "hard", "hard.w=0.25"),
        ("--method dkd --method-arg b=2 --method-arg dkd.b=2", "dkd", "dkd.b=2.0"),  # twice, but the same
    ],
)
def test_spellings(config, line, method, args):
    found = config(line)
    assert (found.method, found.method_args) == (method, args)


def test_kds_own_settings_are_fields_with_flags(config, problem, write):
    assert config("--kd --method-arg T=2 --method-arg kd.w=0.5") == config("--kd --T 2 --w 0.5")
    file = write("kd: true\nT: 8\n")
    assert config(f"--config {file} --method-arg T=2").T == 2.0
    assert config(f"--config {write('method_args: {kd.T: 8}', 'b.yaml')} --kd --T 2").T == 2.0
    assert "gives T `2.0`, but --T gives `3.0`" in problem("--kd --T 3 --method-arg T=2")
    assert "must be at least 0 and at most 1, got `w=2`" in problem("--kd --method-arg w=2")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--method dkd --method-arg bb=2", "no such setting of `dkd`; did you mean b? dkd takes T, a, b, ce, warmup"),
        ("--method dkd --method-arg b=-1", "must be at least 0, got `b=-1` (flag --method-arg)"),
        ("--method dkd --method-arg b=two", "must be a number, got `b=two`"),
        ("--method dkd --method-arg b=nan", "must be a finite number, got `b=nan`"),
        ("--method dkd --method-arg T=0", "must be greater than 0 and at most 1000, got `T=0`"),
        ("--method wttm --method-arg weighted=2", "must be true or false, got `weighted=2`"),
        ("--method dkd --method-arg b", "must be NAME=VALUE, or several joined by commas, got `b`"),
        ("--method kd+dkd --method-arg T=2", "kd and dkd each have a setting `T`; say which, as in kd.T, got `T=2`"),
        ("--method kd --method-arg dkd.b=2", "has no effect: `dkd` is not in the method `kd`"),
        ("--method kd --method-arg dkdd.b=2", "there is no method `dkdd`; did you mean dkd?"),
        ("--method-arg b=2", "the method `ce` takes no settings, got `b=2`"),
        ("--method dkd --method-arg b=2 --method-arg b=3", "`dkd.b` is given as `2` too; keep one, got `b=3`"),
        ("--method kd+kd", "must name a method once, got `kd+kd`"),
        ("--method kd+ce", "must not add ce: the cross-entropy stands in each loss"),
        ("--method kd+dits", "there is no such method; did you mean dist?, got `kd+dits` (flag --method); choose from"),
        ("--method dkd --T 2", "no effect with the method `dkd` (flag --method); its own is --method-arg dkd.T=VALUE"),
        ("--method soft_ce --label-smoothing 0.1", "no effect with the method `soft_ce` (flag --method); leave out"),
        ("--method dkd --mixup 0.2", "`dkd` asks for the one class of a sample"),
        ("--method kd+dkd --cutmix 1", "`dkd` asks for the one class of a sample"),
        ("--kd --teacher-arch resnet50 resnet18x", "network `resnet18x` (flag --teacher-arch) is not known"),
        (
            "--kd --teacher-arch resnet50 resnet34 resnet18 --teacher-weights a b",
            "--teacher-weights `a,b` must be one for all, or one for each of --teacher-arch `resnet50,resnet34,",
        ),
        ("--teacher-arch resnet50 resnet34", "no effect with the method `ce`"),
    ],
)
def test_one_clear_line(problem, line, words):
    found = problem(line)
    assert words in found
    assert found.startswith("--")


def test_all_at_once(problems, write):
    path = write("method: dkd\nmethod_args:\n  b: -1\n  bb: 2\n")
    found = problems(f"--config {path} --method-arg T=x --seed y")
    assert len(found) == 4
    assert sum(f"file {path}, line 3" in line for line in found) == 1
    assert sum(f"file {path}, line 4" in line and "method_args.bb" in line for line in found) == 1
    assert len(problems("--method dkdd --method-arg b=2")) == 1  # no second problem from a method not understood


def test_files_and_layers(parsed, write):
    path = write("method: dkd\nmethod_args:\n  b: 2\n  dkd.T: 1\n")
    config, origins = parsed(f"--data digits --config {path} --method-arg b=4")
    assert config.method_args == "dkd.T=1.0,dkd.b=4.0"
    assert origins["method_args"] == f"flag --method-arg, file {path}"
    text = config_yaml(parsed(f"--data digits --config {path} --method-arg b=4"))
    assert yaml.safe_load(text)["method_args"] == "dkd.T=1.0,dkd.b=4.0"
    assert parsed(f"--config {write(text, 'again.yaml')}").config == config
    # what a file holds for a method that is not in use lies idle
    assert parsed(f"--data digits --config {path} --method dist").config.method_args == ""
    assert parsed(f"--data digits --config {path} --no-kd").config.method == "ce"


def test_a_file_says_only_what_can_be_said(problem, write):
    assert "got a nested mapping" in problem(f"--config {write('lr: {a: 1}')}")
    assert "got a nested mapping" in problem(f"--config {write('method_args: {a: {b: 1}}')}")
    assert "got a list" in problem(f"--config {write('method_args: [a, b]')}")


@pytest.mark.parametrize(
    ("line", "teachers"),
    [
        ("--kd --teacher-arch resnet50", [("resnet50", "DEFAULT")]),
        ("--kd --teacher-arch resnet50 --teacher-weights runs/a,b", [("resnet50", "runs/a,b")]),  # a path of one
        ("--kd --teacher-arch resnet50 efficientnet-b0", [("resnet50", "DEFAULT"), ("efficientnet_b0", "DEFAULT")]),
        ("--kd --teacher-arch resnet50,resnet34 --teacher-weights none", [("resnet50", "none"), ("resnet34", "none")]),
        ("--kd --teacher-arch=resnet50 resnet34 --teacher-weights x y", [("resnet50", "x"), ("resnet34", "y")]),
    ],
)
def test_teachers(config, line, teachers):
    assert config(line).teachers == teachers


def test_teachers_in_files(config, parsed, write):
    path = write("kd: true\nteacher_arch: [resnet50, resnet34]\nteacher_weights: [a, runs/b]\n")
    assert config(f"--config {path}").teachers == [("resnet50", "a"), ("resnet34", "runs/b")]
    again = write(config_yaml(parsed(f"--data digits --config {path}")), "again.yaml")
    assert config(f"--config {again}").teachers == [("resnet50", "a"), ("resnet34", "runs/b")]


def test_features_and_several_teachers_are_refused_by_name(problem):
    for name in (name for name, row in METHODS.items() if row.features):
        found = problem(f"--method kd+{name} --teacher-arch resnet50 resnet34")
        assert f"`{name}` looks at a teacher's features" in found


def test_the_runs_name_follows(config):
    names = {
        config(line).default_name
        for line in (
            "--method dkd", "--method dkd --method-arg b=2", "--method dkd+dist",
            "--method dist+dkd", "--method dkd --method-arg b=8",
        )
    }  # fmt: skip
    assert len(names) == 3


def test_help_of_methods(parsed, capsys):
    with pytest.raises(SystemExit) as left:
        parsed("--help-methods")
    assert left.value.code == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    for name, row in METHODS.items():
        assert f"\n{name}\n" in text
        for fact in (row.paper, row.formula, row.when, *(rule.text for rule in row.settings.values())):
            assert " ".join(fact.split()) in flat
        assert all(rule.limits() in flat for rule in row.settings.values())
    assert "[greater than 0 and at most 1000; default: 4; also --T]" in flat
    assert max(map(len, text.splitlines())) <= 120


def test_settings_are_checked_before_torch_is_there():
    code = (
        "import sys; from dist_kd.cli import parse; parse(sys.argv[1:], {}); "
        "sys.exit('torch' in sys.modules)"
    )  # fmt: skip
    line = "--data digits --method dkd+dist --method-arg b=2 --teacher-arch resnet50 resnet34".replace("b=2", "dkd.b=2")
    assert subprocess.run([sys.executable, "-c", code, *line.split()], timeout=60, check=False).returncode == 0


def test_parse_needs_no_environment():
    assert (
        parse(["--data", "digits", "--method", "wttm", "--method-arg", "g=0.2"], {}).config.method_args == "wttm.g=0.2"
    )
