import json
import math
import random
from pathlib import Path

import pytest

from dist_kd.report import is_run_folder, read_run, write_report
from dist_kd.report.folder import at, number

FILES = ("run.json", "config.yaml", "metrics.jsonl", "status.json", "summary.json", "compression.json")
ODD = (None, True, "text", "", -1, 10**400, 1.5, math.nan, [], {}, [1, {"a": None}], {"a": {"b": []}}, "<b>&\"'")


def test_a_finished_run_says_everything(make_run):
    run = read_run(make_run("done", seed=3, final=88.0, resumed=170))
    assert (run.name, run.seed, run.state, run.missing) == ("done", 3, "done", ())
    assert run.last["top1"] == 88.0 and run.last["step"] == 400
    assert run.best["top1"] > 88.0 and run.best["step"] == 360 and run.best["evaluations"] == 10
    assert run.teacher["top1"] == 91.5 and run.teacher["classes"] == 10
    assert run.resumes == [170]
    assert not run.is_plain and run.epochs_per_step == pytest.approx(1 / 40)


def test_a_run_under_way_takes_its_figures_from_the_metrics(make_run):
    path = make_run("going", steps=130, state="running")
    run = read_run(path)
    assert run.state == "running"
    assert run.last["step"] == 120 and run.last["epoch"] == 3.0
    assert run.best == run.last | {"evaluations": 3.0}
    assert run.teacher["top1"] == 91.5
    assert [text.split(" ")[0] for text in run.missing] == ["summary.json", "compression.json"]


def test_the_best_of_a_run_under_way_is_the_first_of_equals(tmp_path):
    lines = [{"step": step, "kind": "val", "val/top1": top1} for step, top1 in ((1, 50.0), (2, 60.0), (3, 60.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path)
    assert (run.best["step"], run.last["step"]) == (2, 3)


def test_running_with_a_summary_is_done(make_run):
    # the trainer makes the report before its last status
    assert read_run(make_run("ending", state="running")).state == "done"
    assert read_run(make_run("broken", state="failed")).state == "failed"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\xfe{", b"[1, 2]", b"{}", b"[" * 3000, b"a: 2020-13-45", "folder"]
)
def test_any_file_may_be_missing_or_damaged(make_run, name, content):
    path = make_run("odd", seed=1)
    (path / name).unlink()
    if content == "folder":
        (path / name).mkdir()
    elif content is not None:
        (path / name).write_bytes(content)
    report = write_report([path], None)
    assert report["problems"] == []
    (run,) = report["runs"]
    if content != b"{}" or name == "metrics.jsonl":
        assert any(text.startswith(name) for text in run["missing"]), run["missing"]


def mutated(tree, dice: random.Random):
    """The tree with some nodes replaced by odd ones or gone."""
    if dice.random() < 0.08:
        return dice.choice(ODD)
    if isinstance(tree, dict):
        return {key: mutated(value, dice) for key, value in tree.items() if dice.random() > 0.04}
    if isinstance(tree, list):
        return [mutated(value, dice) for value in tree]
    return tree


@pytest.mark.parametrize("seed", range(16))
def test_odd_values_anywhere_neither_raise_nor_lose_a_section(make_run, tmp_path, seed):
    """Each section must cope by itself: a section that gives up would be told under `problems`."""
    dice = random.Random(seed)
    paths = [make_run(f"run{i}", seed=i, kd=i > 0, log_every=40) for i in range(3)]
    for path in paths:
        for name in FILES:
            text = (path / name).read_text()
            if name == "metrics.jsonl":
                lines = [mutated(json.loads(line), dice) for line in text.splitlines()]
                (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
            elif name.endswith(".json"):
                (path / name).write_text(json.dumps(mutated(json.loads(text), dice)))
    html = tmp_path / "report.html" if seed < 4 else None
    assert write_report(paths, html)["problems"] == []


def test_nothing_at_all_is_no_error(tmp_path):
    assert write_report([], tmp_path / "r.html")["html"] is None
    report = write_report([tmp_path / "not-there"], tmp_path / "r.html")
    assert report["problems"] == [] and len(report["runs"][0]["missing"]) == len(FILES)
    assert Path(report["html"]).stat().st_size > 1000


def test_a_page_that_cannot_be_written_is_told(make_run, tmp_path):
    (tmp_path / "file").write_text("")
    report = write_report([make_run("r")], tmp_path / "file" / "report.html")
    assert report["html"] is None and len(report["problems"]) == 1
    assert report["runs"][0]["last"]["top1"] == 88.0


def test_what_is_a_run_folder(make_run, tmp_path):
    assert is_run_folder(make_run("r"))
    assert not is_run_folder(tmp_path) and not is_run_folder(tmp_path / "nowhere")


def test_numbers_and_paths():
    assert [number(x) for x in (1, 2.5, True, "3", None, math.inf, 10**400)] == [1.0, 2.5, None, None, None, None, None]
    tree = {"a": [{"b": 1}]}
    assert (at(tree, "a", 0, "b"), at(tree, "a", 5), at(tree, "a", "b"), at(None, "x")) == (1, None, None, None)
