"""Data of the tests with real processes."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def odd_digits(tmp_path_factory) -> Path:
    """Uneven shards (100, 100, 47) and a prime number of validation samples, cut from the packed digits."""
    from dist_kd.commands.pack import main

    where = tmp_path_factory.mktemp("odd")
    main(["digits", str(where / "all"), "--limit-per-class", "31", "--shard-size", "100", "--jobs", "1"])
    val = _first(where / "all" / "val", where / "val", 61)
    train = _first(where / "all" / "train", where / "train", 247)
    assert (val, train) == (61, 247)
    return where


def _first(source: Path, dest: Path, count: int) -> int:
    """The first `count` samples of the shards in `source`, in shards of 100, indexed."""
    import webdataset as wds

    from dist_kd.data.index import read_index, write_index
    from dist_kd.data.survey import build_index
    from dist_kd.data.tar_reader import TarReader

    index = read_index(source)
    reader, shards = TarReader(index), []
    dest.mkdir()
    for start in range(0, count, 100):
        shards.append(dest / f"odd-{start // 100:06d}.tar")
        with shards[-1].open("wb") as file, wds.TarWriter(file) as writer:
            for sample in range(start, min(start + 100, count)):
                label = int(index.rows[sample]["label"])
                writer.write({"__key__": f"{sample:06d}", "png": reader.read(sample), "cls": str(label)})
    write_index(build_index(dest, shards, name="odd", classes=index.classes, augment="crop", image_size=8))
    return read_index(dest).num_samples
