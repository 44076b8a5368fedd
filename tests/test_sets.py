"""What a run says of its data before it begins."""

from dist_kd.commands.pack import main as pack
from dist_kd.config import Config
from dist_kd.data.finding import open_data, shard_cache
from dist_kd.data.order import Order
from dist_kd.runtime import start_runtime
from dist_kd.sets import on_every_rank, rest_warning


def test_a_large_rest_is_a_warning():
    assert rest_warning(Order((500, 500), 100, 0, 1, 1000)) == []
    assert rest_warning(Order((1050, 1), 1000, 0, 1, 1051)) == []  # 51 of 1051: 4.9 %
    (line,) = rest_warning(Order((1500,), 1000, 0, 1, 1500))
    assert line.startswith("WARNING") and "500 of 1,500 samples (33.3 %)" in line and "batch of `1000`" in line


def test_one_process_opens_a_set_once(tmp_path):
    pack(["digits", str(tmp_path), "--limit-per-class", "3", "--jobs", "1"])
    config, opened = Config(data=str(tmp_path), cpu=True), []

    def open_it():
        opened.append(open_data(str(tmp_path / "train")))
        return opened[-1]

    index = on_every_rank(start_runtime(config), shard_cache(config), open_it)
    assert opened == [index] and index.num_samples > 0
