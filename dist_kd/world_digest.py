"""What all processes of a run must have alike: code, packages, settings and data, compared before the first step."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path

from dist_kd.config import Config
from dist_kd.errors import ConfigError
from dist_kd.run_folder import git_revision, versions
from dist_kd.runtime import Runtime

# Settings that may differ between nodes: where things lie, how they are fetched, who is told. What the data is, is
# compared by its content.
OF_A_NODE = {
    "data", "val_data", "test_data", "save_path", "resume", "cache_gb", "workers", "in_memory", "loader_timeout",
    "wandb", "wandb_project", "tensorboard",
}  # fmt: skip
CODE = "the code of dist_kd"
SHOWN = 6  # differences named in the message


def source_digest() -> str:
    """SHA-256 over the names and contents of this package's own files."""
    here, whole = Path(__file__).parent, hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        whole.update(f"{path.relative_to(here)}\n".encode())
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]


def check_same_world(config: Config, runtime: Runtime, more: dict[str, str]) -> None:
    """ConfigError on all ranks, naming ranks and values, unless all have the same code, packages, settings and `more`.

    One exchange of some 3 KB a rank; nothing where one process trains alone.
    """
    if runtime.world.world_size == 1:
        return
    settings = {f"setting {k}": repr(v) for k, v in config.model_dump(mode="json").items() if k not in OF_A_NODE}
    packages = {f"version of {k}": v for k, v in versions().items()}
    mine = more | {CODE: source_digest()} | packages | settings
    told = runtime.gather((mine, platform.node()))
    found = differences([items for items, _ in told], [node for _, node in told])
    if not found:
        return
    if any(
        line.startswith(CODE) for line in found
    ):  # asked of git only now: it takes a process and a look at all files
        revisions = [r.get("revision", "none")[:12] + "+changes" * bool(r.get("changed")) for r in _revisions(runtime)]
        found.append(f"their git revisions are {', '.join(revisions[:8])}")
    error = ConfigError(
        f"the processes of this run are not alike: {'; '.join(found)}. Start all of them from the same code, packages, "
        "settings and data"
    )
    error.alike = True
    raise error


def _revisions(runtime: Runtime) -> list[dict]:
    return runtime.gather(git_revision())


def differences(items: Sequence[dict[str, str]], nodes: Sequence[str]) -> list[str]:
    """`NAME is VALUE on rank 0 (node n1) and VALUE on ranks 1-3 (node n2)` for what is not the same in all `items`."""
    lines = []
    for name in dict.fromkeys(name for own in items for name in own):
        ranks: dict[str, list[int]] = {}
        for rank, own in enumerate(items):
            ranks.setdefault(own.get(name, "missing"), []).append(rank)
        if len(ranks) > 1:
            lines.append(
                f"{name} is " + " and ".join(f"`{value}` on {_where(some, nodes)}" for value, some in ranks.items())
            )
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]


def _where(ranks: list[int], nodes: Sequence[str]) -> str:
    """`rank 3 (node n2)`, `ranks 0-3, 6 (nodes n1, n2)`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    names = sorted({nodes[rank] for rank in ranks})
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    numbers = ", ".join("-".join(map(str, span)) for span in spans)
    return f"rank{'s' * (len(ranks) > 1)} {numbers} (node{'s' * (len(names) > 1)} {shown})"
