"""`dist-kd doctor [TRAIN FLAGS]`: what can be known before a long run, one line each; 1 if something is BAD."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter

from dist_kd.cli import parse
from dist_kd.doctor import BAD, CHECKS, LOOK, examine
from dist_kd.errors import ConfigError

HELP = f"""usage: dist-kd doctor [FLAGS OF dist-kd train]

Looks at this machine and at the run that these flags ask for, without starting it: packages, W&B, devices, data,
collectives, the place to save, the batch that fits and the time it takes. One line each:

  OK    what was found
  LOOK  worth a look: it would run, perhaps slower or fuller than you like
  BAD   it would fail, or not do what was asked for; the line says what to do

Exit code 0 without a BAD line, else 1 (2: the flags themselves are wrong). Each check has a time limit, {
    sum(check.seconds for check in CHECKS):.0f} s together;
as a rule it is done in half a minute. --data may be missing. Run it alone, once on each machine: it starts processes
of its own. `dist-kd train --help` explains the flags.
"""


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(HELP, end="")
        return 0
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1":
        raise ConfigError(
            f"doctor starts processes of its own, but a launcher has started `{count}` of it (variable WORLD_SIZE); "
            "run it alone, once on each machine"
        )
    config = parse(argv, require_data=False).config
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and the check under way is ended
    states: Counter[str] = Counter()
    for finding in examine(config):
        states[finding.state] += 1
        print(f"{finding.state:<5} {finding.name:<12} {finding.text}", flush=True)
    told = ", ".join(f"{states[state]} {state}" for state in (BAD, LOOK) if states[state])
    print(f"{sum(states.values())} lines: {told or 'all OK'}")
    return int(states[BAD] > 0)
