"""A student whose head folds: the run leaves it folded too, with the same answers to every validation image."""

import json

import pytest
import torch

from dist_kd import models
from dist_kd.commands.evaluate import main as evaluate
from dist_kd.train import main as train

WORDS = ["--no-kd", "--image-size", "12", "--batch-size", "32", "--workers", "0", "--cpu", "--max-steps", "6"]


@pytest.mark.parametrize("more", [[], ["--ema-decay", "0.5"]], ids=["last", "averaged"])
def test_both_folders_give_the_trainers_counts(digits, tmp_path, capsys, more):
    run = tmp_path / "run"
    words = ["--arch", "residual_cnn", *WORDS, "--lr", "0.01", *more, "--data", str(digits), "--save-path", str(run)]
    assert train(words) == 0
    said = capsys.readouterr().out
    (line,) = (text for text in said.splitlines() if text.startswith("folded "))
    # 105,344 of the stages and 128 x 7 x 7 inputs: 500 x (6,272 + 1) + 1,000 + 5,010, or 62,730 folded
    assert "3,247,854 parameters folded into 168,074" in line and "student_folded/" in line
    assert float(line.split("differ by ")[1].split()[0]) < 1e-4
    assert "same function as residual_cnn_folded: parameters 168,074 (5.17 % of the student's)" in said
    assert json.loads((run / "compression.json").read_text())["folded"]["parameters"] == 168_074
    assert "residual_cnn_folded: parameters 168,074 (5.17" in (run / "report.html").read_text()
    assert "| student `residual_cnn_folded` |" in (run / "student_folded" / "README.md").read_text()

    answers = {}
    for name in ("student", "student_folded"):
        evaluate([str(run / name), "--data", str(digits), "--json", "--workers", "0"])
        answers[name] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    last = json.loads((run / "summary.json").read_text())["student"]["last"]
    assert answers["student_folded"]["arch"] == "residual_cnn_folded"
    for key in ("samples", "top1_hits", "top5_hits"):
        assert answers["student_folded"][key] == answers["student"][key]
    assert answers["student_folded"]["top1"] == last["top1"]
    assert answers["student_folded"]["loss"] == pytest.approx(last["loss"], rel=1e-5)

    whole, folded = (models.load(run / name) for name in ("student", "student_folded"))
    images = torch.randn(16, 3, 12, 12)
    with torch.no_grad():
        expected, found = whole(images).logits, folded(images).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_network_without_such_a_head_leaves_nothing_more(digits, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(["--arch", "cnn_small", *WORDS, "--data", str(digits), "--save-path", str(run)]) == 0
    assert "folded  " not in capsys.readouterr().out and not (run / "student_folded").exists()
    assert "folded" not in json.loads((run / "compression.json").read_text())
