"""Where images come from before they are packed: the known data sets by name, and any image folder by path.

One small file per kind, imported when asked for. Nothing here needs torch except the files torchvision unpacks.
"""

from __future__ import annotations

import difflib
import importlib
import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from dist_kd.errors import ConfigError, DataError

CACHE_VARIABLE = "DIST_KD_CACHE"


class Item(NamedTuple):
    """One image before packing."""

    key: str  # its path below its split's folder, with /; unique within the split
    image: str | bytes  # a file's path, or the content of one
    label: int


@dataclass(frozen=True)
class Source:
    """A set of images with labels, before packing."""

    name: str
    classes: tuple[str, ...]  # label k is classes[k]
    augment: str  # the usual augmentation; "" leaves it to the images' size
    splits: dict[str, list[Item]]  # "train", and "val", "test" where the set has them
    image_size: int | None = None  # pixels, if all images have one square size; None: seen when packing


SOURCES: dict[str, str] = {  # name -> the file of this folder that knows it
    "digits": "digits",
    "cifar10": "cifar",
    "cifar100": "cifar",
    "caltech101": "caltech",
    "caltech256": "caltech",
    "imagenet": "imagenet",
}


def open_source(where: str, root: Path | None = None, download: bool = False, class_list: Path | None = None) -> Source:
    """What is to be packed: a known set's name (its files lie below `root`), or an image folder's path.

    With `class_list` the labels are line numbers of that file. ConfigError if there is no such thing, DataError if it
    is not what it should be.
    """
    if where in SOURCES and (root is not None or not Path(where).is_dir()):
        source = importlib.import_module(f"dist_kd.data.sources.{SOURCES[where]}").open_source(where, root, download)
    elif root is not None or download:
        raise ConfigError(
            f"`--root` and `--download` belong to a known set, but `{where}` is none; choose from {', '.join(SOURCES)}"
        )
    else:
        if not Path(where).is_dir():
            near = difflib.get_close_matches(where, SOURCES, n=2)
            hint = f"did you mean {' or '.join(f'`{name}`' for name in near)}? " if near else ""
            raise ConfigError(
                f"source `{where}` is neither a folder nor a known set; {hint}give a folder with one subfolder per "
                f"class (or train/ and val/ of that form), or one of {', '.join(SOURCES)}"
            )
        from dist_kd.data.sources import folder

        source = folder.open_source(Path(where))
    return source if class_list is None else _relabelled(source, read_class_list(class_list), class_list)


def read_class_list(path: Path) -> tuple[str, ...]:
    """The class names of a file with one per line: line k, from 0, names class k."""
    try:
        names = Path(path).read_text(encoding="utf-8").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"class list `{path}` cannot be read ({error}); give a text file, one class per line"
        ) from None
    names = [name.strip() for name in names]
    for line, name in enumerate(names, start=1):
        if not name:
            raise ConfigError(f"class list `{path}` has an empty line {line}; line numbers are labels, so name a class")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"class list `{path}` names `{twice}` twice; each class has one line")
    return tuple(names)


def _relabelled(source: Source, lines: tuple[str, ...], path: Path) -> Source:
    """The same images with labels looked up in the class list, by whole lines or else by their first words.

    So a list may describe its classes (`n01440764 tench`) while the folders are named by the first word alone.
    """
    first_words = tuple(line.split()[0] for line in lines)
    readings = [lines, first_words] if len(set(first_words)) == len(lines) else [lines]
    classes = max(readings, key=lambda names: len(set(names) & set(source.classes)))
    number = {name: k for k, name in enumerate(classes)}
    missing = [name for name in source.classes if name not in number]
    if missing:
        near = difflib.get_close_matches(missing[0], classes, n=3)
        hint = f"close to it: {', '.join(f'`{name}`' for name in near)}" if near else "nothing close to it"
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ConfigError(
            f"class `{missing[0]}`{others} of `{source.name}` is not among the {len(classes)} of the class list "
            f"`{path}`, {hint}; add it there or rename the folder"
        )
    labels = [number[name] for name in source.classes]
    splits = {
        split: [item._replace(label=labels[item.label]) for item in items] for split, items in source.splits.items()
    }
    return replace(source, classes=classes, splits=splits)


def needs_root(name: str, root: Path | None) -> Path:
    """`root`, or the error that asks for it."""
    if root is None:
        raise ConfigError(f"`{name}` needs `--root DIR`, the folder where torchvision keeps or should put its files")
    return root


def cache_folder() -> Path:
    """Where packed known sets are looked for: the variable DIST_KD_CACHE, else ~/.cache/dist_kd."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "dist_kd")


def ensure_known(name: str) -> Path | None:
    """The packed folder of a known set, or None if `name` is not one; the digits are packed at the first use.

    Any number of processes may call this at once: each packs aside, and the first rename stands.
    """
    if name not in SOURCES:
        return None
    packed = cache_folder() / name
    if (packed / "train" / "index.json").is_file():
        return packed
    if name != "digits":
        raise ConfigError(
            f"`--data {name}` is not packed yet; run `dist-kd pack {name} {packed} --root DIR`, where DIR has "
            f"torchvision's files of {name} (`--download` fetches them where that is allowed), or set {CACHE_VARIABLE}"
        )
    from dist_kd.data.pack import pack_source

    try:
        packed.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=packed.parent))
    except OSError as error:
        raise DataError(
            f"the cache `{packed.parent}` cannot be written ({error.strerror}); set {CACHE_VARIABLE}"
        ) from None
    try:
        pack_source(open_source(name), aside / name, jobs=1)
        os.rename(aside / name, packed)
    except OSError:  # it is there: another process was faster, with the same bytes
        if not (packed / "train" / "index.json").is_file():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return packed
