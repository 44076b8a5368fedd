"""docs/data.md is true: its code prints what stands below it, its walk through an epoch and its table are computed."""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest
from data.plain_order import laid_out, plain_epoch

from dist_kd.data.order import Order

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "data.md"
SIZES, BATCH, SEED, STREAMS, WINDOW = (6, 4, 3), 4, 1, 2, 4  # as in the code of the page


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def cut(numbers: list[int], lengths: list[int]) -> str:
    """The numbers in columns, with a bar between parts."""
    parts = []
    for length in lengths:
        parts.append(" ".join(f"{number:>2}" for number in numbers[:length]))
        numbers = numbers[length:]
    return " | ".join(parts)


def walk(epoch: int) -> str:
    """An epoch step by step: the parts by the plain construction, the batches by the real one."""
    pieces, rotation = laid_out(SIZES, WINDOW, SEED, epoch)
    laid = [sample for piece in pieces for sample in piece]
    turned = laid[rotation:] + laid[:rotation]
    ends = {piece[-1] for piece in pieces}
    lengths, count = [], 0
    for sample in turned:
        count += 1
        if sample in ends or sample == turned[-1]:
            lengths.append(count)
            count = 0
    in_order = sorted(pieces)
    order = Order(SIZES, BATCH, SEED, STREAMS, WINDOW)
    shown = order.epoch_order(epoch)
    assert shown.tolist() == plain_epoch(SIZES, BATCH, SEED, STREAMS, WINDOW, epoch)
    length = order.steps_per_epoch * BATCH // STREAMS
    windows = [min(WINDOW, length - first) for first in range(0, length, WINDOW)]
    share = BATCH // STREAMS
    lines = [
        ("shards", cut(list(range(sum(SIZES))), list(SIZES))),
        ("1  cut into pieces of at most W = 4", cut([s for p in in_order for s in p], [len(p) for p in in_order])),
        ("   pieces permuted", cut(laid, [len(piece) for piece in pieces])),
        (f"   rotated by {rotation}", cut(turned, lengths)),
    ]
    for stream in range(STREAMS):
        positions = turned[stream * length : (stream + 1) * length]
        rows = shown[:, stream * share : (stream + 1) * share].ravel().tolist()
        lines.append((f"2  stream {stream}, in windows", cut(positions, windows)))
        lines.append(("3  permuted inside windows", cut(rows, windows)))
    lines.append(("   left out", cut(turned[STREAMS * length :], [order.left_out])))
    for k, batch in enumerate(shown.tolist()):
        lines.append((f"4  batch {k} = 2 of each stream", cut(batch, [share] * STREAMS)))
    return "".join(f"{name:<38}{text}\n" for name, text in lines)


def test_the_walk_through_an_epoch():
    assert walk(0) in blocks("text")


def test_the_code_prints_what_the_page_says():
    (code,) = blocks("python")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, str(PAGE), "exec"), {})
    assert said.getvalue() in blocks("text")


def test_the_table_of_windows_is_what_its_command_prints(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import windows

    windows.main([])
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| [0-9P-]", line)]
    assert len(rows) == 20 and "\n".join(rows) in PAGE.read_text()
    for name in ("windows", "paired"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("page", ["README.md", "dist_kd/README.md"])
def test_the_page_is_found(page):
    assert "docs/data.md" in (ROOT / page).read_text()


if __name__ == "__main__":
    print(walk(0))
