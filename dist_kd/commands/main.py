"""`dist-kd COMMAND ...`: finds the command's module and hands it the rest of the line."""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

from dist_kd import __version__
from dist_kd.cli import ended, nearest, shown
from dist_kd.cli.flags import refuse_secrets
from dist_kd.errors import ConfigError


class Command(NamedTuple):
    """A module with `main(argv) -> int`, and what it does in one line."""

    module: str
    text: str


COMMANDS: dict[str, Command] = {
    "train": Command("dist_kd.train", "train a student, with or without a teacher"),
    "doctor": Command("dist_kd.commands.doctor", "look at this machine and at the run that train flags ask for"),
    "sweep": Command("dist_kd.commands.sweep", "a study: values of one setting, several seeds, a table and a plot"),
    "evaluate": Command("dist_kd.commands.evaluate", "score a run, a student's folder or a network on a data set"),
    "pack": Command("dist_kd.commands.pack", "turn an image folder or a known data set into indexed shards"),
    "index": Command("dist_kd.commands.index", "index shards that somebody else has written"),
    "verify": Command("dist_kd.commands.verify", "check shards against their index"),
    "report": Command("dist_kd.commands.report", "make one HTML page of one or more runs"),
    "compress": Command("dist_kd.commands.compress", "compare two networks: parameters, bytes, FLOPs, latency"),
    "demo": Command("dist_kd.commands.demo", "the whole story on small digits: nothing to download, minutes on a CPU"),
}


def help_text() -> str:
    lines = ["usage: dist-kd COMMAND ...", "", "Distributed knowledge distillation of image classifiers.", ""]
    lines += [f"  {name:<10}{command.text}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "dist-kd COMMAND --help tells more; dist-kd --version prints the version.", ""])


def main(argv: list[str] | None = None) -> int:
    """Runs one command; its exit code."""
    return ended(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    if not argv:
        print(help_text(), end="", file=sys.stderr)
        return ConfigError.exit_code
    name, *rest = argv
    if name in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if name == "--version":
        print(f"dist-kd {__version__}")
        return 0
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        hint = f"did you mean {near}?" if near else f"commands: {', '.join(COMMANDS)}"
        raise ConfigError(f"there is no command {shown(name)}; {hint}")
    refuse_secrets(rest)
    return importlib.import_module(COMMANDS[name].module).main(rest)


if __name__ == "__main__":
    sys.exit(main())
