"""The house holds: floors, rooms, homes of other people's packages, names, lengths, no torch before it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dist_kd"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# From the ground up. A file imports only from rows below its own, or from its own room (a folder); so the rooms of one
# row do not import each other. The letters part a floor where one file of it builds on another.
FLOORS: list[tuple[str, set[str]]] = [
    ("F0", {"__init__", "contracts", "errors", "stop_signals"}),
    ("F1", {"experiment"}),
    ("F1a", {"config"}),
    ("F1b", {"plan", "train_state"}),
    ("F2", {"models", "methods", "data", "tracking"}),
    ("F3", {"teacher", "learner", "optimizer", "ema", "meters", "evaluation", "checkpoint", "compression", "watchdog"}),
    ("F3a", {"run_lock", "runtime", "stragglers"}),
    ("F3b", {"run_folder", "sets", "updates"}),
    # the command line asks rooms for names only; it is below wiring, which writes the settings back through it
    ("F4", {"loop", "cli", "report", "world_digest", "out_of_memory", "first_failure"}),
    ("F4b", {"resume", "results", "sweep", "teacher_score"}),
    ("F5", {"wiring"}),
    ("F5b", {"lifetime", "doctor"}),
    ("F6", {"train", "commands"}),
]
STOREY = {name: number for number, (_, names) in enumerate(FLOORS) for name in names}

# file or room -> all that it may import of ours, where the floors alone would allow more
NARROW: dict[str, set[str]] = {
    "contracts": set(),
    "errors": set(),
    "experiment": set(),
    "config": {"experiment"},
    "methods": {"errors", "contracts"},
    "report": {"__init__", "errors", "contracts", "config", "methods", "tracking"},  # reads files; trains nothing
    "loop": set(STOREY) - {"models", "methods", "data", "tracking", "cli", "report"},  # knows none of them by name
}

# package -> where it may be imported, as beginnings of paths under dist_kd/
HOMES: dict[str, tuple[str, ...]] = {
    "accelerate": ("runtime.py",),
    "efficientnet_pytorch": ("models/efficientnet_zoo.py",),
    "timm": ("models/timm_zoo.py",),
    "torchvision": ("models/", "data/decode.py", "data/views.py", "data/augment.py", "data/sources/"),
    "webdataset": ("data/pack.py", "data/index.py", "data/tar_writer.py"),
    "wandb": ("tracking/wandb_run.py",),
    "tensorboard": ("tracking/tensorboard.py",),
    "matplotlib": ("report/",),
    "sklearn": ("data/sources/digits.py",),
    "pydantic": ("experiment.py", "cli/"),
    "yaml": ("cli/", "report/"),
    "requests": ("data/remote.py",),
    "urllib3": ("data/remote.py",),
    "fsspec": ("data/remote.py",),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room(path: str) -> str:
    """`data/order.py` -> data, `loop.py` -> loop."""
    return path.split("/")[0].removesuffix(".py")


def nodes(path: Path) -> Iterator[ast.AST]:
    """Every node of a file but those under `if TYPE_CHECKING`, which nothing runs."""
    stack: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
            continue
        yield node
        stack += ast.iter_child_nodes(node)


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at its top or later, also by a written-out importlib.import_module."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            first = node.args[0]
            if isinstance(first, ast.JoinedStr):
                first = first.values[0]
            if isinstance(first, ast.Constant):
                yield first.value


def breaches(path: Path, here: str) -> list[str]:
    """What this file, standing in the room `here`, imports although it may not."""
    found = []
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "dist_kd":
            continue
        # `from dist_kd import __version__` is of the package itself, on the ground
        there = parts[1] if len(parts) > 1 and parts[1] in STOREY else "__init__"
        if there != here and (STOREY[there] >= STOREY[here] or there not in NARROW.get(here, STOREY)):
            found.append(f"{path.name} ({FLOORS[STOREY[here]][0]}) imports {name} ({FLOORS[STOREY[there]][0]})")
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_from_lower_floors_only(path):
    here = room(name_of(path))
    assert here in STOREY, f"{path.name} stands on no floor: give it one in this test, and in dist_kd/README.md"
    assert breaches(path, here) == []


def test_the_map_has_every_room_on_its_floor():
    drawn, floor = {}, ""
    for line in (PACKAGE / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith(("| F", "| |")):
            _, number, rooms, *_ = line.split("|")
            floor = number.strip() or floor
            drawn |= dict.fromkeys(
                (name.rstrip("/").removesuffix(".py") for name in re.findall("`(.+?)`", rooms)), floor
            )
    assert drawn == {name: floor[:2] for floor, names in FLOORS for name in names if name != "__init__"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_packages_stay_at_home(path):
    for name in imports(path):
        package = "tensorboard" if name.startswith("torch.utils.tensorboard") else name.split(".")[0]
        homes = HOMES.get(package)
        assert homes is None or name_of(path).startswith(homes), f"{name_of(path)} imports {name}"


def test_the_checks_find_what_they_look_for(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import torch\n"
        "if TYPE_CHECKING:\n    from dist_kd import wiring\n"
        "def f():\n    from dist_kd.data.order import Order\n    from dist_kd import wiring\n"
        "import_module('dist_kd.models')\n"
        "import_module(f'dist_kd.methods.{name}')\n"
        "torch.load('x')\ntorch.load('x', weights_only=False)\ntorch.load('x', weights_only=True)\n"
    )
    assert sorted(imports(bad)) == [
        "dist_kd.data.order.Order", "dist_kd.methods.", "dist_kd.models", "dist_kd.wiring", "torch"
    ]  # fmt: skip
    assert len(breaches(bad, "tracking")) == 4  # three other rooms of its floor, and one above
    assert len(breaches(bad, "loop")) == 4 and breaches(bad, "train") == []
    assert len(unsafe_loads(bad)) == 2


def test_no_long_file():
    long = {name: count for p in FILES + TESTS if (count := len(p.read_text().splitlines())) > 400 for name in [str(p)]}
    assert not long, "a file owns one thing; split it where it owns two"


def test_names_say_what_is_inside():
    banned = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [p for p in FILES + TESTS if banned & {p.stem, *p.relative_to(ROOT).parts}]


def test_no_module_shadows_a_package():
    # run as a file, train.py finds dist_kd/ itself on the path before it can repair that
    ours = {p.stem for p in PACKAGE.iterdir() if not p.name.startswith(("_", "."))} - {"README"}
    installed = {name for name, owners in metadata.packages_distributions().items() if set(owners) != {"dist-kd"}}
    assert not ours & set(sys.stdlib_module_names)
    assert not ours & installed


@pytest.mark.parametrize("module", ["dist_kd", "dist_kd.cli", "dist_kd.config", "dist_kd.methods", "dist_kd.models"])
def test_import_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def unsafe_loads(path: Path) -> list[str]:
    """Calls of torch.load that do not write out weights_only=True: they could run what a file tells them to."""
    return [
        f"{path.name}:{node.lineno}"
        for node in nodes(path)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.load"
        and not any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
    ]


def test_torch_load_is_told_to_load_weights_only():
    scripts = [*FILES, *TESTS, *(ROOT / "benchmarks").rglob("*.py")]
    assert [found for path in scripts for found in unsafe_loads(path)] == []


def test_sources_are_ascii():
    written = [*FILES, *TESTS, *(ROOT / "configs").rglob("*.yaml"), *(ROOT / "launch").rglob("*.*")]
    assert [str(p) for p in written if p.is_file() and not p.read_bytes().isascii()] == []
