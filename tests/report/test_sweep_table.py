"""The table and the plot of a study, from run folders with known figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dist_kd.report import read_run
from dist_kd.report.sweep_page import plot, positions
from dist_kd.report.sweep_table import Arm, Results, facts, markdown, table, write

PLAIN, T1, T8 = (85.0, 85.5, 84.5), (88.0, 88.75, 87.25), (85.5, 85.0, 85.25)


@pytest.fixture
def arm(make_run):
    """A label, its value and a score a seed (None: not done) -> an arm of the study."""

    def make(label: str, value, finals, twin: str | None = None, test: float | None = None) -> Arm:
        runs = {}
        for seed, final in enumerate(finals):
            if final is None:
                runs[seed] = None
                continue
            folder = make_run(f"{label}-{seed}".replace(" ", "-"), seed=seed, kd=twin is not None, final=final)
            if test is not None:
                _add_test(folder, final - test)
            runs[seed] = read_run(folder)
        return Arm(label, value, runs, twin)

    return make


def _add_test(folder: Path, top1: float) -> None:
    """What a run says that was scored on a test set."""
    summary = json.loads((folder / "summary.json").read_text())
    summary["student"]["test"] = {
        "last": {"top1": top1}, "chosen": {"top1": top1 + 0.25}, "highest": {"top1": top1 + 1},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def study(arm) -> Results:
    twin = arm("without teacher", 1.0, PLAIN)
    arms = [arm("1", 1.0, T1, twin.label), arm("8", 8.0, (*T8[:2], None), twin.label)]
    return Results("T", arms, [twin], "dist-kd sweep x --over T=1,8 --twin")


def test_the_table_by_hand(study):
    """T 1: differences 3, 3.25, 2.75; mean 3, sd 0.25, half width 4.303 * 0.25 / sqrt 3 = 0.62. T 8: 0.5, -0.5."""
    found = table(study)
    twin, one, eight = (dict(zip([c.lstrip(">") for c in found.columns], row, strict=True)) for row in found.rows)
    assert twin["T"] == "without teacher" and twin["Last top-1 (%)"] == "85.00 \u00b1 0.50"
    assert twin["To the twin (points)"] == "-"
    assert one["Last top-1 (%)"] == "88.00 \u00b1 0.75" and one["To the twin (points)"] == "+3.00 (+2.38 to +3.62)"
    # two of three seeds: paired with the twin's first two, 12.706 * 0.7071 / sqrt 2 = 6.35
    assert eight["To the twin (points)"] == "+0.00 (-6.35 to +6.35)"
    assert eight["Runs"] == "2 of 3, missing: seed 2" and one["Runs"] == "3 of 3"
    assert "the highest of a run's 10 evaluations" in found.note and "selects" not in found.note
    assert "confirm the winner on data that took no part in it, by `dist-kd evaluate RUN" in found.note


def test_last_and_best_are_not_mixed_up(study):
    row = dict(zip(table(study).columns, table(study).rows[1], strict=True))
    assert row[">Last top-1 (%)"] != row[">Best top-1 (%)"]
    best = [run.best["top1"] for run in study.arms[0].runs.values()]
    assert row[">Best top-1 (%)"].startswith(f"{sum(best) / 3:.2f} ")


def test_test_scores_have_columns_where_there_are_some(arm):
    twin = arm("without teacher", 1.0, PLAIN, test=1.0)
    results = Results("T", [arm("1", 1.0, T1, twin.label, test=1.5)], [twin], "")
    found = table(results)
    row = dict(zip(found.columns, found.rows[1], strict=True))
    assert row[">Test top-1, last epoch (%)"] == "86.50 \u00b1 0.75"
    assert row[">Test top-1, epoch chosen on validation (%)"] == "86.75 \u00b1 0.75"
    assert row[">Test top-1, highest of all epochs (%)"] == "87.50 \u00b1 0.75"
    assert "chosen on the test set, and therefore optimistic too" in found.note
    assert facts(results)["values"][0]["to_twin_test"]["last"]["points"] == pytest.approx(2.5)


def test_what_is_written(study, tmp_path):
    said = write(tmp_path, study)
    text = (tmp_path / "sweep.md").read_text()
    assert said in text and said.isascii() and study.command in text
    assert len({len(line) for line in markdown(table(study)).splitlines()}) == 1  # readable as it stands
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["value"] for row in found["values"]] == [1.0, 8.0]
    assert found["values"][0]["to_twin"]["points"] == pytest.approx(3.0)
    assert found["values"][1]["missing_seeds"] == [2]
    assert found["twins"][0]["top1_last"]["by_seed"] == {"0": 85.0, "1": 85.5, "2": 84.5}
    page = (tmp_path / "sweep.html").read_text()
    assert "<svg" in page and "8: seed 2" in page
    assert not re.search(r"(src|href)=\"https?:", page) and "<script" not in page


def test_the_axis():
    def scale(*values):
        return positions([Arm(str(v), v, {}) for v in values])[1]

    assert scale(0.5, 1, 3, 5, 7, 10) == "linear"  # a factor of 20 and no more
    assert scale(0.001, 0.01, 0.1) == "log"
    assert scale(0.0, 0.1, 0.9) == "linear"  # a logarithm has no zero
    assert scale("crop", "crop+flip") == scale(None, 0.1) == scale(True, False) == "category"


@pytest.mark.parametrize("values", [(0.001, 0.1), ("crop", "none"), (2.0, 3.0)])
def test_the_plot_shows_every_seed(arm, values):
    """A twin for each value: what the study varies matters to the student alone too."""
    twins = [arm(f"{v}, without teacher", v, PLAIN) for v in values]
    arms = [arm(str(v), v, T1, twin.label) for v, twin in zip(values, twins, strict=True)]
    svg = plot(Results("setting", arms, twins, ""))
    assert "top-1 (%)" in svg and ">setting" in svg
    for text in (*map(str, values), "without teacher", "with teacher"):
        assert f">{text}<" in svg, text
    # each small dot is a marker used once: 2 values x 2 arms x 3 seeds
    assert len(re.findall(r"opacity: 0\.65", svg)) >= 12


def test_nothing_done_yet_is_said(arm, tmp_path):
    results = Results("T", [arm("1", 1.0, (None, None))], [], "")
    assert "0 of 2, missing: seed 0, 1" in write(tmp_path, results)
    assert "No run is done yet" in (tmp_path / "sweep.html").read_text()
