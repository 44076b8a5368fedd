"""The teacher is scored once for a run; what was kept of it is used only if it is whole and of the same things."""

import json

from walks.training import SETTINGS, train

AGAIN = "(scored at an earlier start)"
SHORT = ("--in-memory", "--workers", "0")


def start(folder, digits, capsys, settings=SETTINGS) -> list[str]:
    """The lines on the teacher of a start that stops at once."""
    capsys.readouterr()
    assert train(folder, digits, *SHORT, settings=settings, stop_at_batch=0) == "preempted"
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("teacher  ") and "samples" in line]


def with_other(**values: str) -> list[str]:
    """The settings of all these runs, with other values of some flags."""
    words = list(SETTINGS)
    for name, value in values.items():
        words[words.index(f"--{name.replace('_', '-')}") + 1] = value
    return words


def test_kept_until_something_changes(digits, tmp_path, capsys):
    (first,) = start(tmp_path, digits, capsys)
    path = tmp_path / "teacher_validation.json"
    kept = json.loads(path.read_text())
    answers = [int(number) for number in kept["answers"].split()]
    assert kept["scores"]["samples"] == 20 == sum(answer >= 0 for answer in answers)
    assert len(answers) > 20 and f"{kept['scores']['top1_hits']}/20" in first
    assert start(tmp_path, digits, capsys) == [f"{first} {AGAIN}"]
    (more,) = start(tmp_path, digits, capsys, with_other(teacher_eval_samples="30"))
    assert " on 30 validation samples" in more and AGAIN not in more


def test_several_teachers_are_kept_with_their_lines(digits, tmp_path, capsys):
    both = with_other(teacher_arch="cnn_medium,cnn_small", teacher_weights="none,none")
    lines = start(tmp_path, digits, capsys, both)
    assert len(lines) == 3
    assert start(tmp_path, digits, capsys, both) == [f"{line} {AGAIN}" for line in lines]


def test_what_is_damaged_is_made_anew(digits, tmp_path, capsys):
    (first,) = start(tmp_path, digits, capsys)
    path = tmp_path / "teacher_validation.json"
    whole = path.read_text()

    def changed(**parts) -> str:
        return json.dumps(json.loads(whole) | parts)

    scores = json.loads(whole)["scores"]
    for text in (
        *("", whole[:-40], "[]", "null", '"x"', "[" * 100_000, changed(key={}), changed(key=None), changed(answers="")),
        *(changed(answers="1 2 3"), changed(answers=[1]), changed(answers=json.loads(whole)["answers"] + " 0")),
        changed(answers=json.loads(whole)["answers"].replace("-1", "10", 1)),
        *(changed(scores=scores | {"samples": "20"}), changed(scores={}), changed(lines=None)),
    ):
        path.write_text(text)
        assert start(tmp_path, digits, capsys) == [first], text[:80]
        assert path.read_text() != text
    path.unlink()
    path.mkdir()  # it cannot be kept: that is no reason not to train
    assert start(tmp_path, digits, capsys) == [first]


def test_the_agreement_is_that_of_the_answers(digits, tmp_path):
    """With answers that were kept, every evaluation compares with the same ones: proved by changing them."""
    assert train(tmp_path, digits, *SHORT, stop_at_batch=28) == "preempted"
    path = tmp_path / "teacher_validation.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"answers": " ".join(["-1"] * len(kept["answers"].split()))}))
    assert train(tmp_path, digits, *SHORT) == "done"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = ["val/agreement" in line for line in lines if line["kind"] == "val"]
    assert told == [True, False, False]  # before the stop, and behind it
