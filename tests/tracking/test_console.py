import io
import os
import threading

from dist_kd.tracking.console import HEADER, ConsoleTracker, train_row

TRAIN = {
    "train/loss": 1.25,
    "train/loss_ce": 2.0,
    "train/loss_kd": 1.1666,
    "train/top1": 43.75,
    "train/lr": 0.1,
    "train/epoch": 2.5,
    "time/step_ms": 200.0,
    "time/data_ms": 10.0,
    "time/teacher_ms": 90.0,
    "time/images_per_s": 1280.0,
}
VAL = {"val/top1": 61.2, "val/top5": 90.0, "val/loss": 1.5, "val/ece": 3.25, "val/agreement": 70.5}
VAL |= {"val/samples": 1000.0, "val/seconds": 2.5}


def test_plain_lines_are_what_a_log_file_should_hold():
    stream = io.StringIO()
    tracker = ConsoleTracker("run", 1000, stream=stream)
    tracker.note("loss = CE [not markup]")
    tracker.log(TRAIN, 1000)
    tracker.log(VAL, 1000, kind="val")
    tracker.log({"val/top1": 61.2, "test/top1": 59.4, "test/samples": 900.0}, 1000, kind="val")
    tracker.log({}, 1000, kind="resume")
    tracker.close("done")
    assert stream.getvalue().splitlines() == [
        "loss = CE [not markup]",
        "step 1000/1000  epoch   2.50  loss 1.250 (ce 2.000, kd 1.167)  top-1  43.75 %  lr 0.1  "
        "200.0 ms/step (data 5 %, teacher 45 %)  1280 images/s",
        "step 1000/1000  validation  top-1 61.20 %  top-5 90.00 %  agreement 70.50 %  ECE 3.25 %  loss 1.500  "
        "1000 samples  in 2.5 s",
        "step 1000/1000  validation  top-1 61.20 %  test top-1 59.40 %",
        "resumed at step 1000",
    ]


def test_plain_lines_of_a_run_are_aligned():
    stream = io.StringIO()
    tracker = ConsoleTracker("run", 1000, stream=stream)
    tracker.log(TRAIN, 5)
    tracker.log(TRAIN | {"train/epoch": 12.0, "train/top1": 100.0}, 500)
    first, second = stream.getvalue().splitlines()
    assert first.index("ms/step") == second.index("ms/step")
    assert "left 0:" in first


def test_any_part_may_be_missing():
    stream = io.StringIO()
    tracker = ConsoleTracker("run", 10, stream=stream)
    for values in ({}, {"train/loss": float("nan")}, {"time/data_ms": 1.0}, {"time/step_ms": 0.0}):
        tracker.log(values, 1)
        tracker.log(values, 1, kind="val")
        assert len(train_row(values, 1)) == len(HEADER)
    assert "loss nan" in stream.getvalue()


def read_terminal(act) -> str:
    """What a real terminal receives while `act(stream)` runs."""
    main, side = os.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(main, 4096):
                chunks.append(chunk)
        except OSError:  # the other side is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(side, "w") as stream:
        act(stream)
    reader.join(10)
    os.close(main)
    return b"".join(chunks).decode()


def test_terminal_gets_a_bar_a_header_and_rows(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")

    def act(stream) -> None:
        tracker = ConsoleTracker("student", 40, stream=stream)
        tracker.note("loss = [bold] stays as it is")
        tracker.note("a name \x1b]0;owned\x07 of others")
        for step in range(21):
            tracker.log(TRAIN, step)
        tracker.log(VAL, 20, kind="val")
        tracker.close("done")

    text = read_terminal(act)
    assert text.count(HEADER) == 2  # again after 20 rows
    assert train_row(TRAIN, 7) in text
    assert "[bold] stays" in text
    assert r"a name \x1b]0;owned\x07 of others" in text and "\x07" not in text
    assert "steps" in text and "best top-1 61.20 %" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again
