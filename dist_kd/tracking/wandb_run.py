"""Mirrors metrics to Weights & Biases, offline where there is no key or no server. The only file that imports wandb.

The mode is decided before the first init, because an init that cannot reach its server waits for its whole timeout,
and a later offline init in the same process may then fail too.
"""

from __future__ import annotations

import netrc
import os
import socket
import threading
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CONNECT_SECONDS = 3.0
INIT_SECONDS = 10.0
FINISH_SECONDS = 30.0  # what is not uploaded by then stays on disk, for `wandb sync`
DEFAULT_SERVER = "https://api.wandb.ai"
KEY_VARIABLES = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


def _has_key(host: str, env: Mapping[str, str]) -> bool:
    if any(env.get(name) for name in KEY_VARIABLES):
        return True
    paths = [env["NETRC"]] if env.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in paths:
        try:
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _route(server: str) -> tuple[str, int]:
    """Host and port of the first hop to the server: its own, or those of the proxy in force."""
    url = urlsplit(server)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "//" in proxy else f"http://{proxy}")
    return url.hostname or "", url.port or (443 if url.scheme == "https" else 80)


def reachable(host: str, port: int, seconds: float = CONNECT_SECONDS) -> bool:
    """Whether a plain TCP connection stands within `seconds`, name resolution included."""
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            answered.set()
        except (OSError, UnicodeError):
            pass

    # in a thread, because looking up a name has no time limit of its own
    thread = threading.Thread(target=connect, daemon=True, name="wandb-reachable")
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def decide_mode(env: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Mode for wandb and why, in a few words. WANDB_MODE is obeyed as it is; else online only if that can work."""
    if env.get("WANDB_MODE"):
        return env["WANDB_MODE"], f"WANDB_MODE is {env['WANDB_MODE']}"
    try:
        server = env.get("WANDB_BASE_URL") or DEFAULT_SERVER
        name = urlsplit(server).netloc
        if not _has_key(name, env):
            return "offline", f"no API key for {name}"
        host, port = _route(server)
    except ValueError:  # a malformed address or port
        return "offline", f"{server} is not a usable address"
    if not reachable(host, port):
        return "offline", f"no answer from {host}:{port} within {CONNECT_SECONDS:g} s"
    return "online", "key found, server answers"


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one level, keys joined by `/`; lists are left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (str, int, float, bool)):
            flat[f"{prefix}{key}"] = value
    return flat


class WandbTracker:
    """One W&B run. No call raises: the first failure is told in one line through `note`, then all calls do nothing."""

    def __init__(
        self,
        run_dir: Path,
        *,
        run_id: str,
        name: str,
        project: str,
        settings: dict[str, Any],
        note: Callable[[str], None],
    ) -> None:
        self._note = note
        self._run: Any = None
        self._guard(self._open, run_dir, run_id, name, project, settings)

    def _guard(self, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
        # SystemExit too: wandb leaves by sys.exit when its service ends badly
        except (Exception, SystemExit) as error:
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._note(f"warning: W&B is off from here on ({reason[:200]}); metrics.jsonl is complete")

    def _open(self, run_dir: Path, run_id: str, name: str, project: str, settings: dict[str, Any]) -> None:
        mode, reason = decide_mode()
        if mode == "disabled":
            return
        import wandb

        self._run = wandb.init(
            dir=str(run_dir),
            project=project,
            name=name,
            id=run_id,
            resume="allow",  # a requeued job goes on in the same run; offline each start is a folder of its own
            mode=mode,
            config=settings,
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,
                x_disable_meta=True,  # holds argv verbatim, and a shard address may carry a signature
                x_save_requirements=False,
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
            ),
        )
        # after a crash steps repeat: with an axis of our own the repeated ones are drawn, not refused
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if mode == "offline":
            self._note(f"W&B offline ({reason}); upload later: wandb sync {self._run.settings.sync_dir}")
        else:
            self._note(f"W&B {mode}: {self._run.url}")

    def log(self, values: dict[str, float], step: int, kind: str = "train") -> None:
        if self._run is not None:
            self._guard(self._run.log, {**values, "step": step})

    def summary(self, values: dict[str, Any]) -> None:
        if self._run is not None:
            self._guard(self._run.summary.update, flatten(values))

    def close(self, status: str) -> None:
        """Ends the run; waits FINISH_SECONDS at most. Any status but `done` or `preempted` marks it as failed."""
        if self._run is not None:
            self._guard(self._run.finish, 0 if status in ("done", "preempted") else 1)
            self._run = None
