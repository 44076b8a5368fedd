"""What an order costs does not depend on where it starts, and a large index stays small in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_kd.data import order
from dist_kd.data.order import Order

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "order_cost.py"
WRITE = "import sys, pathlib, order_cost; order_cost.write_synthetic(pathlib.Path(sys.argv[1]))"


@pytest.mark.parametrize(("streams", "window"), [(1, 4000), (1, 300), (4, 250)])
def test_a_start_draws_only_the_words_of_its_windows(monkeypatch, streams, window):
    """One of each piece, one for the rotation, and those of the window of each stream, or two of them, of the step."""
    drawn = []

    def counted(*args, **kwargs):
        words = random_words(*args, **kwargs)
        drawn.append(len(words))
        return words

    random_words = order.random_words
    monkeypatch.setattr(order, "random_words", counted)
    sizes, pieces = (900, 1100, 2000), {4000: 3, 300: 14, 250: 17}[window]
    steps = Order(sizes, 40, 0, streams, window).steps_per_epoch
    for step in (0, steps // 2, steps * 9 // 10, 7 * steps + 3):
        order._laid_out.cache_clear()
        drawn.clear()
        Order(sizes, 40, 0, streams, window).global_batch(step)
        assert sum(drawn) <= pieces + 1 + 2 * streams * min(window, 4000 // streams)
    order._laid_out.cache_clear()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is looked up in /proc")
def test_an_index_of_imagenets_size_adds_less_than_100_mb(tmp_path):
    """1,281,167 samples in 147 shards, at the first step of the second epoch, when it has held the first: the worst."""
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path)], cwd=SCRIPT.parent, check=True, timeout=60)
    for layout in ("full shuffle", "16 streams"):
        command = [sys.executable, str(SCRIPT), str(tmp_path), layout, "100"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        added = json.loads(said)
        assert added["rows"] == 128 and 0 < added["peak"] < 100_000_000
