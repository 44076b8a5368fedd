"""Real photographs and weights, where they are at hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real archives beside the repository (or DIST_KD_TEST_DATA); skips where there is none."""
    folder = Path(os.environ.get("DIST_KD_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; DIST_KD_TEST_DATA names another folder")
    return folder
