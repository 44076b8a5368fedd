"""The design card's command: `accelerate launch dist_kd/train.py --arch ... --teacher-arch ... --kd --T 4 --w 0.9`.

Path repair, parse, train, exit code; also `python -m dist_kd.train` and `dist-kd train`. Imports torch only after the
command line has been found good.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

# Run as a file, dist_kd/ itself stands first on the path: `import dist_kd` would fail, and our rooms would be taken
# for other people's packages (`models`, `data`). The folder above takes its place.
if __name__ == "__main__":
    _here = Path(__file__).resolve().parent
    sys.path[:] = [str(_here.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != _here)]

from dist_kd import stop_signals

# SLURM's warning can come while torch is still being imported, and would kill a process that has no handler yet: it is
# noted, and ends the run before its first step
if __name__ == "__main__":
    _for_good = stop_signals.noting()
    _for_good.__enter__()  # also after the run: a second signal must not change how it ended

from dist_kd.cli import ended, parse


def main(argv: list[str] | None = None) -> int:
    """Trains as the command line says; the process's exit code (errors.py; 75: stopped, the same line goes on)."""
    begun = time.monotonic()
    with stop_signals.noting():
        return ended(lambda: _train(sys.argv[1:] if argv is None else argv, begun))


def _train(argv: list[str], begun: float) -> int:
    parsed = parse(argv)
    from dist_kd.lifetime import run_training  # imports torch, which takes seconds: after every typo was found

    return run_training(parsed, begun)


if __name__ == "__main__":
    sys.exit(main())
