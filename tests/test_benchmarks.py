"""Each benchmark runs in a tiny configuration and says what it should. No times are judged here."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *flags], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def load(monkeypatch):
    """Imports a script as its neighbours do, and forgets it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == BENCHMARKS:
            del sys.modules[name]


def test_step(tmp_path):
    from dist_kd.commands.pack import main as pack

    pack(["digits", str(tmp_path / "digits"), "--limit-per-class", "30", "--jobs", "1"])
    out = run(
        *("step.py", "--data", str(tmp_path / "digits"), "--batch-size", "16", "--rounds", "2", "--steps", "3"),
        *("--part-rounds", "1", "--json", str(tmp_path / "step.json")),
    )
    assert "trainer / bare, wall clock" in out and "| meters " in out
    found = json.loads((tmp_path / "step.json").read_text())
    assert found["loss_difference"] < 1e-5  # both loops do the same
    assert len(found["rounds"]["wall"]["bare"]) == 2 and found["ratio"]["wall"]["median"] > 0
    assert found["parts_ms"]["trainer"]["teacher"] > 0 and found["machine"]["torch"] == torch.__version__


def test_gpu_kd(tmp_path):
    pytest.importorskip("timm")
    out = run("gpu_kd.py", "--tiny", "--mixed-precision", "no", "--json", str(tmp_path / "gpu.json"))
    assert "ours / timm's" in out and "ours / (teacher alone + student alone)" in out
    losses = json.loads((tmp_path / "gpu.json").read_text())["first_loss"]
    assert losses["ours"] == pytest.approx(losses["timm's"], rel=1e-4)  # both do the same work


def test_allocator(tmp_path):
    out = run("allocator.py", "--tiny", "--rounds", "2", "--steps", "1", "--json", str(tmp_path / "allocator.json"))
    assert "cnn_small, 8 x 32 px" in out and "freed memory kept or given back" in out
    found = json.loads((tmp_path / "allocator.json").read_text())["cnn_small"]
    assert [len(found["seconds"][name]) for name in ("kept", "given back")] == [2, 2]


def test_saving(tmp_path):
    out = run("saving.py", "--tiny", "--json", str(tmp_path / "saving.json"))
    assert "| save / step " in out and "| share of an interval of 300 s " in out
    found = json.loads((tmp_path / "saving.json").read_text())
    assert set(found["files"]) >= {"model.safetensors", "ema.safetensors", "optimizer.pt", "manifest.json"}
    for number, save in enumerate(found["save"]):
        parts = [seconds[number] for seconds in found["parts"].values()]
        assert all(parts) and sum(parts) <= save  # each part is done, and none counted twice


def test_starting(tmp_path):
    out = run("starting.py", "--tiny", "--threads", "1", "--json", str(tmp_path / "starting.json"))
    assert "tiny: cnn_medium teaches cnn_small" in out and "| imports " in out
    found = json.loads((tmp_path / "starting.json").read_text())["tiny"]
    for kind in ("new", "resumed"):
        (one,) = found[kind]
        assert sum(one["parts"].values()) == pytest.approx(one["whole"], abs=0.2)  # parts of nothing are left out


def test_agreement(tmp_path):
    out = run("agreement.py", "--tiny", "--json", str(tmp_path / "agreement.json"))
    assert "Agreement on stops of 2 processes (gloo)" in out
    found = json.loads((tmp_path / "agreement.json").read_text())
    assert found["processes"] == 2 and len(found["look_ms"]) == 2 and min(found["look_ms"]) > 0


def without_test_scores(metrics: str) -> str:
    lines = [json.loads(line) for line in metrics.splitlines()]
    return "".join(json.dumps({k: v for k, v in line.items() if k[:5] != "test/"}) + "\n" for line in lines)


def test_collect(tmp_path):
    from dist_kd.cli import parse
    from dist_kd.commands.pack import main as pack
    from dist_kd.lifetime import run_training

    pack(["digits", str(tmp_path / "digits"), "--limit-per-class", "30", "--test-fraction", "0.2", "--jobs", "1"])
    for seed in "0", "1":
        line = ["--arch", "cnn_small", "--data", str(tmp_path / "digits"), "--image-size", "8", "--batch-size", "32"]
        more = ["--max-steps", "2", "--cpu", "--seed", seed, "--save-path", str(tmp_path / f"run-{seed}")]
        assert run_training(parse([*line, *more], {})) == 0
    to = tmp_path / "results.json"
    out = run("collect.py", str(tmp_path / "run-0"), str(tmp_path / "run-1"), "--to", str(to))
    assert "cnn_small, labels only | 0, 1 " in out and " +- " in out
    assert str(tmp_path) not in to.read_text()  # no machine's paths
    first, second = json.loads(to.read_text())
    assert first["student"]["test"]["last"]["samples"] == second["student"]["test"]["last"]["samples"] > 0
    assert (second["settings"]["seed"], second["settings"]["batch_size"]) == (1, 32)
    metrics = tmp_path / "run-1" / "metrics.jsonl"  # as of a recipe whose validation images are the test images
    metrics.write_text(without_test_scores(metrics.read_text()))
    for name in "run-0", "run-1":
        run("collect.py", str(tmp_path / name), "--to", str(to), "--curves", str(tmp_path / f"{name}.svg"))
    drawn = [(tmp_path / f"run-{seed}.svg").read_text().count("stroke-width: 1.2;") for seed in (0, 1)]
    assert drawn[0] == drawn[1] >= 3  # both panels of the test set, and the legend


def test_methods(tmp_path):
    out = run("methods.py", "--tiny", "--methods", "dist", "--json", str(tmp_path / "methods.json"))
    assert "| method " in out and "step / ce" in out
    found = json.loads((tmp_path / "methods.json").read_text())["methods"]
    assert list(found) == ["ce", "kd", "dist"] and found["ce"]["beside_ce"]["median"] == 1
    assert found["kd"]["buffers"] == 0 and len(found["dist"]["rounds_s"]) == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is looked up in /proc")
def test_resume(tmp_path):
    out = run(
        *("resume.py", "--rounds", "1", "--calls", "1", "--workers", "0", "--batch-size", "8"),
        *("--json", str(tmp_path / "resume.json")),
    )
    assert "at 90 % of the epoch" in out and "the next epoch, after this" in out
    found = json.loads((tmp_path / "resume.json").read_text())
    assert [row["workers"] for row in found["starts"]] == [0] and len(found["costs"]) == 6
    assert all(one["own"] > 0 for row in found["costs"] for one in row["rounds"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would measure")
def test_gpu_kd_says_that_there_is_no_gpu(load, capsys):
    assert load("gpu_kd").main([]) == 0
    assert "not measured: no GPU at hand" in capsys.readouterr().out


def test_teacher(load, tmp_path, capsys):
    threads = torch.get_num_threads()
    load("teacher").main(["--tiny", "--rounds", "2", "--calls", "1", "--json", str(tmp_path / "teacher.json")])
    assert "cnn_medium, none" in capsys.readouterr().out and torch.get_num_threads() == threads
    (found,) = json.loads((tmp_path / "teacher.json").read_text())["teachers"]
    assert found["saved_bytes"] == 0 and found["saved_bytes_plain_per_image"] > 0
    assert 0 < found["distance"] < 0.1 and found["hits"] is None


def test_loader(tmp_path):
    from dist_kd.commands.pack import main as pack

    digits = str(tmp_path / "digits")
    pack(["digits", digits, "--limit-per-class", "15", "--jobs", "1"])
    out = run(
        *(
            "loader.py",
            "--data",
            digits,
            "--memory-data",
            digits,
            "--rounds",
            "2",
            "--shards",
            "3",
            "--per-shard",
            "16",
        ),
        *("--size", "16", "--batch-size", "8", "--batches", "2", "--workers", "1", "--memory-batches", "1"),
        *("--steps", "1", "--step-threads", "1", "--json", str(tmp_path / "loader.json")),
    )
    assert "| ours / webdataset to float32, 1 workers " in out and "cores such as this" in out
    found = json.loads((tmp_path / "loader.json").read_text())
    assert {row["bar"] for row in found["rows"]} >= {1.8, 4.0, 0.85, 8.0, 10.0, 0.05}
    assert all(row["verdict"] in ("", "met", "missed", "inconclusive") for row in found["rows"])
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in found["rounds_s"].values())
    for rival in ("mosaicml-streaming, by number", "litdata, shuffled"):
        assert f"| {rival}, originals " in out  # with its figure, or as not installed


def test_verdicts(load):
    row = load("loader").Row
    spread = load("paired").Spread
    for ratio, bar, most, expected in (
        *((2.0, 1.8, False, "met"), (1.7, 1.8, False, "missed"), (1.8, 1.8, False, "met"), (1.7, None, False, "")),
        *((0.04, 0.05, True, "met"), (0.06, 0.05, True, "missed"), (0.05, 0.05, True, "met")),
    ):
        assert row("", spread(ratio, 0, 9), True, bar, most).verdict == expected
        assert row("", spread(ratio, 0, 9), False, bar, most).verdict == "inconclusive"


def test_self_timed_rivals(load):
    asked = []
    rivals = {name: (lambda name=name: asked.append(name) or len(asked)) for name in "ab"}
    times = load("paired").self_timed(rivals, rounds=3)
    assert "".join(asked) == "abbaab" and times.wall == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_turns_and_spreads(load):
    paired = load("paired")
    called = []
    rivals = {name: (lambda name=name: called.append(name)) for name in "ab"}
    times = paired.take_turns(rivals, rounds=2, calls=3, device=torch.device("cpu"), turn=2)
    # two turns a round, of two calls and one, each after one that is not timed; every other turn backwards
    assert "".join(called) == 2 * ("bbbaaa" + "aabb") and len(times.wall["a"]) == 2
    times = paired.Times({"a": [2.0, 6.0, 3.0], "b": [1.0, 2.0, 2.0]}, {})
    assert times.ratio("a", "b") == (2.0, 1.5, 3.0) and times.ms("b") == (2000.0, 1000.0, 2000.0)
    assert not times.steady("a") and times.ratio("a", "b").show("x") == "2.00 [1.50 - 3.00] x"
    assert paired.table(["a", "bb"], [["ccc", "d"]]) == "| a   | bb |\n| --- | -- |\n| ccc | d  |"
