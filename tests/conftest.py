"""What all tests share: real data where it is at hand, and a switch that turns skips into failures."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real archives beside the repository (or DIST_KD_TEST_DATA); skips where there is none."""
    folder = Path(os.environ.get("DIST_KD_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; DIST_KD_TEST_DATA names another folder")
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With DIST_KD_REQUIRE_ALL a skipped test has failed: a missing browser or data set must not pass unseen."""
    report = yield
    if report.skipped and os.environ.get("DIST_KD_REQUIRE_ALL") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, but DIST_KD_REQUIRE_ALL is set: {report.longrepr}"
    return report
