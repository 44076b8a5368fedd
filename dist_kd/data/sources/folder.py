"""An image folder: one subfolder per class, or train/ and val/ (or test/) of that form."""

from __future__ import annotations

import os
from pathlib import Path

from dist_kd.data.sources import Item, Source
from dist_kd.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")  # compared in lower case
HELD_OUT = {"val": "val", "validation": "val", "valid": "val", "test": "test"}  # folder -> split


def open_source(path: Path, name: str | None = None, augment: str = "") -> Source:
    """The images below `path`; classes are the sorted names of all class folders. DataError if there are none."""
    found = {HELD_OUT[child]: path / child for child in HELD_OUT if (path / child).is_dir()}
    if (path / "train").is_dir() and found:
        folders = {"train": path / "train", **found}
    elif (path / "train").is_dir() and len(_subfolders(path)) == 1:
        folders = {"train": path / "train"}
    else:
        folders = {"train": path}
    return read_splits(folders, name or path.resolve().name, augment)


def read_splits(folders: dict[str, Path], name: str, augment: str) -> Source:
    """A source of these class folders' parents, one per split; every class of a later split must be in train."""
    listed = {split: list_images(folder) for split, folder in folders.items()}
    classes = tuple(sorted(listed["train"]))
    for split, by_class in listed.items():
        strange = sorted(set(by_class) - set(classes))
        if strange:
            raise DataError(
                f"class folder `{folders[split] / strange[0]}` is in {split} but not in train, so nothing would be "
                f"learned of it ({len(strange)} such); remove it, or add its training images"
            )
    number = {name: k for k, name in enumerate(classes)}
    splits = {
        split: [
            Item(key, os.path.join(folders[split], key), number[class_name])
            for class_name, keys in by_class.items()
            for key in keys
        ]
        for split, by_class in listed.items()
    }
    return Source(name, classes, augment, splits)


def list_images(folder: Path) -> dict[str, list[str]]:
    """Class name -> sorted paths of its images, relative to `folder` and with /; hidden files are passed over.

    Links are followed: whoever packs a folder packs what it shows, also where that lies elsewhere.
    """
    class_names = _subfolders(folder)
    if not class_names:
        loose = sum(name.lower().endswith(EXTENSIONS) for name in os.listdir(folder))
        found = f"{loose} images but no class folders" if loose else "no class folders"
        raise DataError(f"`{folder}` holds {found}; it must have one subfolder per class with that class's images")
    listed = {}
    for class_name in class_names:
        keys = []
        for at, folders, files in os.walk(folder / class_name, followlinks=True):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for link in (os.path.join(at, name) for name in folders):  # a circle would give each image forty times
                if os.path.islink(link) and Path(at).resolve().is_relative_to(Path(link).resolve()):
                    raise DataError(f"`{link}` is a link to a folder that it lies in; remove it")
            below = os.path.relpath(at, folder).replace(os.sep, "/")
            keys += [f"{below}/{file}" for file in files if file.lower().endswith(EXTENSIONS) and file[0] != "."]
        if not keys:
            raise DataError(
                f"class folder `{folder / class_name}` holds no image ({', '.join(EXTENSIONS)}); fill or remove it"
            )
        listed[class_name] = sorted(keys)
    return listed


def _subfolders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
