"""Data of the end-to-end tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """About 330 training digits in shards of 100, and some for validation."""
    from dist_kd.commands.pack import main

    where = tmp_path_factory.mktemp("digits")
    main(["digits", str(where), "--limit-per-class", "41", "--shard-size", "100", "--jobs", "1"])
    return where
