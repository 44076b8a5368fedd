import json

import pytest

from dist_kd.report import read_run, tables
from dist_kd.report.compare import group_runs


@pytest.fixture
def groups(runs):
    return group_runs([read_run(path) for path in runs])


def row(table, head: str) -> dict[str, str]:
    """The row that begins with `head`, by column."""
    (found,) = [cells for cells in table.rows if cells[0].startswith(head)]
    return dict(zip((column.lstrip(">") for column in table.columns), found, strict=True))


def test_headline_shows_the_last_evaluation_and_names_the_best_as_such(groups):
    table = tables.headline(groups)
    teacher = row(table, "Teacher: wide_cnn")
    assert (teacher["Top-1 (%)"], teacher["Top-5 (%)"], teacher["Loss (nats)"]) == ("91.50", "99.25", "0.3125")
    assert teacher["Samples"] == "2,000"
    alone = row(table, "Student alone")
    assert alone["Top-1 (%)"] == "85.00 \u00b1 0.50" and alone["Runs"] == "3 (seeds 0, 1, 2)"
    distilled = row(table, "Student distilled")
    assert distilled["Top-1 (%)"] == "88.00 \u00b1 0.75"
    assert distilled["Best top-1 (%)"].endswith("(best of 10)") and not distilled["Best top-1 (%)"].startswith("88.00")
    assert "optimistic" in table.note


def test_headline_of_a_run_under_way_says_so_far(make_run):
    runs = [make_run("a", seed=0), make_run("b", seed=1, steps=130, state="running")]
    table = tables.headline(group_runs([read_run(path) for path in runs]))
    assert row(table, "Student distilled")["Evaluated"] == "so far in 1 of 2"
    assert row(table, "Student distilled")["Best top-1 (%)"].endswith("(best of 3 to 10)")


TEST_COLUMNS = ("last epoch", "epoch chosen on validation", "highest of all epochs")


def test_headline_has_columns_for_a_test_set_where_there_is_one(runs, make_run):
    plain = group_runs([read_run(path) for path in runs])
    assert not [column for column in tables.headline(plain).columns if "Test" in column]
    tested = make_run("tested", T=8.0, test="t", final=88.0)
    table = tables.headline(group_runs([read_run(path) for path in [*runs, tested]]))
    figures = row(table, "Student distilled: tiny_cnn, kd (T 8.0)")
    last, chosen, highest = (figures[f"Test top-1, {which} (%)"] for which in TEST_COLUMNS)
    assert (last, highest) == ("86.00", "99.50") and chosen not in (last, highest)
    assert row(table, "Student alone")["Test top-1, last epoch (%)"] == "-"
    assert row(table, "Teacher")["Test top-1, last epoch (%)"] == "-"  # of the first run, which had no test set
    assert "no part in training or choosing" in table.note
    assert ("test", "things/test", "1,000", "10", "t") in tables.data(group_runs([read_run(tested)])).rows


def test_a_run_under_way_shows_its_test_set_from_its_lines(make_run):
    whole, part = (read_run(make_run(f"r{steps}", test="t", steps=steps)) for steps in (400, 240))
    assert part.test("last")["top1"] == pytest.approx(part.of_kind("val")[-1]["val/top1"] - 2)
    assert part.test("highest")["top1"] == 99.5 and part.test("highest")["epoch"] == 4
    assert part.test("chosen")["step"] == part.best["step"] and part.test("chosen")["evaluations"] == 6
    assert whole.test("chosen")["epoch"] == whole.best["epoch"] == 9
    assert set(part.last) == set(whole.last)  # the test set's figures are not the validation set's


def test_compression_ratios_are_worked_out_from_both_sides(groups):
    (table,) = tables.compression(groups)  # the plain runs' student is in the pair's table already
    assert table.name == "wide_cnn to tiny_cnn"
    parameters = row(table, "Parameters")
    assert (parameters["Teacher"], parameters["Student"]) == ("10,000,000", "1,250,000")
    assert (parameters["Teacher / student"], parameters["Student is"]) == ("8.00 x", "12.50 %")
    assert row(table, "State dict")["Teacher"] == "40.1 MB"
    assert row(table, "FLOPs")["Student"] == "42 MFLOP"
    assert row(table, "CPU latency, batch 32")["Teacher / student"] == "5.00 x"


def test_a_teachers_own_training_is_no_student(runs, make_run):
    own = make_run("teacher", kd=False, arch="wide_cnn", final=91.5)
    groups = group_runs([read_run(path) for path in [*runs, own]])
    assert row(tables.headline(groups), "Another network")["Top-1 (%)"] == "91.50"
    assert [table.name for table in tables.compression(groups)] == ["wide_cnn to tiny_cnn"]


def test_compression_without_a_teacher_is_the_student_alone(make_run):
    (table,) = tables.compression(group_runs([read_run(make_run("p", kd=False))]))
    assert table.columns == ("Quantity", ">Student") and ("Parameters", "1,250,000") in table.rows


def test_speed_shares_are_of_the_step(groups):
    times = row(tables.speed(groups), "tiny_cnn, kd")
    assert times["Step (ms)"] == "50.0" and times["Waiting for data (%)"] == "4.0"
    assert (times["Teacher (%)"], times["Student (%)"]) == ("40.0", "52.0")
    assert times["Whole run"] == "12 min 34 s"


def test_speed_of_a_run_under_way_is_the_mean_of_its_log_points(make_run):
    run = read_run(make_run("r", steps=130, state="running"))
    times = tables.timing(run)
    assert times["step_ms"] == 50.0 and 2.0 < times["data_ms"] < 3.0 and "total_s" not in times


def test_settings_that_differ_come_first_with_units(groups):
    differ, same = tables.settings(groups)
    assert [cells[0] for cells in differ.rows] == ["method", "seed", "save_path"]
    assert row(differ, "seed")["tiny_cnn, kd"] == "0, 1, 2"
    assert ("batch_size (samples)", "256") in same.rows
    assert not {cells[0] for cells in differ.rows} & {cells[0] for cells in same.rows}


def test_what_was_skipped_is_counted_with_its_kinds(groups):
    skipped = row(tables.skipped(groups), "kd-s2")
    assert (skipped["Left out of each epoch"], skipped["Damaged samples"]) == ("10", "3")
    assert skipped["Kinds of damage"] == "label 1, truncated 2"


def test_a_run_under_way_shows_its_damage_too(make_run):
    folder = make_run("under-way", steps=130, state="running")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    next(line for line in reversed(lines) if line["kind"] == "train").update(
        {"data/bad/decode": 2, "data/bad/label": 1}
    )
    next(line for line in reversed(lines) if line["kind"] == "val")["val/bad_samples"] = 4
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    skipped = row(tables.skipped(group_runs([read_run(folder)])), "under-way")
    assert skipped["Damaged samples"] == "3" and skipped["Kinds of damage"] == "decode 2, label 1"
    assert skipped["Damaged in validation"] == "4"


def test_runs_say_how_they_stand_and_where_they_were_resumed(groups, make_run):
    table = tables.runs(groups)
    assert row(table, "kd-s2")["Resumed at"] == "step 170" and row(table, "kd-s1")["Resumed at"] == "never"
    assert row(table, "kd-s2")["Processes x device"] == "2 x Some CPU; 1 x Some CPU"
    stopped = tables.runs(group_runs([read_run(make_run("stopped", steps=130, state="preempted"))]))
    assert row(stopped, "stopped")["State"] == "preempted: SIGTERM"
    assert row(stopped, "stopped")["Steps"] == "130 of 400"


def test_figures_with_prefixes():
    assert tables.scaled(11_580_000_000, "FLOP") == "11.58 GFLOP"
    assert tables.scaled(999, "") == "999"
    assert tables.size(1536) == "1.5 KiB"
    assert [tables.duration(s) for s in (0.5, 75, 3700, None)] == ["0.5 s", "1 min 15 s", "1 h 1 min", "-"]
