"""Mirrors metrics to Weights & Biases, offline where there is no key or no server. The only file that imports wandb.

The mode is decided before the first init, because an init that cannot reach its server waits for its whole timeout; if
a server fails only then (it takes connections and answers too late), the run goes offline all the same. All calls of
wandb are made by a thread of our own: one that hangs (a service that is stuck takes what fits into a socket, then
blocks for ever) holds up nothing else.
"""

from __future__ import annotations

import contextlib
import netrc
import os
import queue
import re
import signal
import socket
import threading
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CONNECT_SECONDS = 3.0
START_SECONDS = 10.0  # longest that training waits for W&B before it starts without it
INIT_SECONDS = 10.0
LEEWAY_SECONDS = 5.0
FINISH_SECONDS = 30.0  # what is not uploaded by then stays on disk, for `wandb sync`
MOST_WAITING = 10_000  # log points kept for a service that is slow
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
        name = urlsplit(server).netloc.rpartition("@")[2]  # a password in the address is not printed
        if not _has_key(name, env):
            return "offline", f"no API key for {name}"
        host, port = _route(server)
    except ValueError:  # a malformed address or port
        return "offline", "WANDB_BASE_URL is not a usable address"
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


def _short(error: BaseException) -> str:
    """Why, for a message: one line without passwords in addresses."""
    return (re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split())) or type(error).__name__)[:200]


class WandbTracker:
    """One W&B run. No call raises or waits: the first failure is told through `note`, then all calls do nothing.

    Only opening and closing wait: START_SECONDS and a little over FINISH_SECONDS at most.
    """

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
        self._given_up = False
        self._late = False  # whether it was said that not all is kept
        self._calls: queue.Queue[Callable[[Any], None] | None] = queue.Queue(MOST_WAITING)
        self._opened = threading.Event()
        identity = (run_dir, run_id, name, project, settings)
        self._thread = threading.Thread(target=self._work, args=identity, daemon=True, name="wandb")
        self._thread.start()
        if not self._opened.wait(START_SECONDS):
            note(f"W&B has not opened within {START_SECONDS:g} s; training starts, and W&B gets all once it has")

    def _work(self, *identity: Any) -> None:
        self._guard(self._open, *identity)
        self._opened.set()
        while (call := self._calls.get()) is not None:
            if self._run is not None:
                self._guard(call, self._run)

    def _ask(self, call: Callable[[Any], None] | None) -> None:
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            if not self._late:
                self._late = True
                self._note("warning: W&B does not keep up, and misses some values from here on; metrics.jsonl has all")

    def _guard(self, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
        # SystemExit too: wandb leaves by sys.exit when its service ends badly
        except (Exception, SystemExit) as error:
            self._run = None
            if not self._given_up:
                self._note(f"warning: W&B is off from here on ({_short(error)}); metrics.jsonl is complete")

    def _open(self, run_dir: Path, run_id: str, name: str, project: str, settings: dict[str, Any]) -> None:
        mode, reason = decide_mode()
        if mode == "disabled":
            return
        # its reports about itself: sent at the end, where a silent server would be waited for twice 10 s
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        def begin(mode: str) -> Any:
            return wandb.init(
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

        try:
            self._run = begin(mode)
        except Exception as error:
            if mode == "offline":
                raise
            mode, reason = "offline", _short(error)
            wandb.teardown()  # its service takes no second run of this name
            self._run = begin(mode)
        # after a crash steps repeat: with an axis of our own the repeated ones are drawn, not refused
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if mode == "offline":
            self._note(f"W&B offline ({reason}); upload later: wandb sync {self._run.settings.sync_dir}")
        else:
            self._note(f"W&B {mode}: {self._run.url}")

    def log(self, values: dict[str, float], step: int, kind: str = "train") -> None:
        self._ask(lambda run: run.log({**values, "step": step}))

    def summary(self, values: dict[str, Any]) -> None:
        flat = flatten(values)
        self._ask(lambda run: run.summary.update(flat))

    def close(self, status: str) -> None:
        """Ends the run. Any status but `done` or `preempted` marks it as failed."""
        self._ask(lambda run: run.finish(0 if status in ("done", "preempted") else 1))
        self._ask(None)
        self._thread.join(FINISH_SECONDS + LEEWAY_SECONDS)
        if self._thread.is_alive():
            self._given_up = True
            self._note("warning: W&B did not end in time, and is ended; metrics.jsonl is complete")
            _end_service()


def _end_service() -> None:
    """Kills wandb's own service, a child of this process: at its end the interpreter would wait for it."""
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in children.read_text().split():
                if Path(f"/proc/{pid}/comm").read_text().startswith("wandb-core"):
                    os.kill(int(pid), signal.SIGKILL)
