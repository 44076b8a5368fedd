"""`dist-kd sweep`: a study of one setting over several seeds; the work is in dist_kd.sweep."""

from __future__ import annotations

from dist_kd.sweep import run_sweep


def main(argv: list[str]) -> int:
    """Exit code: 0 all runs done, 1 a run failed, 75 stopped. ConfigError before the first run starts."""
    return run_sweep(argv)
