"""A name becomes a network: `resolve`, `build`, `load`, `save_student`. Imports no torch until something is built.

One file per zoo, each with the same four functions: `construct` (random weights), `view` (what it expects of its
input), `published` (weights others trained) and `taps` (where its features are). A new family is one file and one line
in names.py.
"""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_kd.errors import ConfigError
from dist_kd.models.names import ROLES, resolve, split

if TYPE_CHECKING:
    from dist_kd.models.network import Network

__all__ = [
    "Network",
    "build",
    "fold_affine_head",
    "foldable",
    "freeze_backbone",
    "head_parameters",
    "load",
    "resolve",
    "save_student",
]

MODULES = {
    "torchvision": "torchvision_zoo",
    "effnet": "efficientnet_zoo",
    "timm": "timm_zoo",
    "cifar": "cifar",
    "originals": "originals",
}
# where a class of ours is found, so that `dist_kd.models.Network` needs no torch before it is asked for
LAZY = {
    "Network": "network",
    "save_student": "student_folder",
    "fold_affine_head": "originals",
    "foldable": "originals",
    "freeze_backbone": "freezing",
    "head_parameters": "freezing",
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(importlib.import_module(f"dist_kd.models.{LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build(
    arch: str,
    num_classes: int | None,
    weights: str = "none",
    *,
    role: str = "student",
    wants: frozenset[str] = frozenset(),
    image_size: int | None = None,
) -> Network:
    """The network `arch` with `weights`; random ones come from torch's generator as the caller seeded it.

    num_classes None means what the weights have (1000 without any). `role` says which flags an error names; weights
    for another number of classes are refused, but a student gets them with a fresh head, which `notes` and
    `spec.weights` then say. `wants` are features, by role or path (Network). `image_size` (pixels) overrides the side
    that the weights were trained for. ConfigError for all that cannot be.
    """
    from dist_kd.contracts import NetworkSpec
    from dist_kd.models import student_folder
    from dist_kd.models import weights as files
    from dist_kd.models.network import Network

    arch_flag, flag = ROLES[role]
    arch = resolve(arch, arch_flag)
    zoo_name, name = split(arch)
    zoo = importlib.import_module(f"dist_kd.models.{MODULES[zoo_name]}")
    offers = zoo.published(name)
    source = files.choose(weights, offers, arch, flag)
    view, label, state, has = zoo.view(name), "none", None, None
    strict = num_classes is not None and role != "student"  # a fresh head would make a teacher guess
    if isinstance(source, files.Published):
        view, label, has = source.view, source.label, source.num_classes
        if strict:
            _check_classes(label, arch, has, num_classes, flag)  # before a download
        state = files.read(files.locate(source, arch, flag), flag)
    elif source is not None:
        label = str(source)
        folder = student_folder.find(source, flag)
        if folder:
            config = student_folder.read_config(folder, flag)
            student_folder.check_arch(config, arch, folder, flag)
            view, has, source = config.view, config.num_classes, folder / student_folder.WEIGHTS
            if strict:
                _check_classes(label, arch, has, num_classes, flag)
        else:
            by_name = {offer.file_name: offer for offer in offers if offer.url}
            source_offer = by_name.get(source.name)  # a published file that was fetched by hand
            view, label = (source_offer.view, source_offer.label) if source_offer else (view, label)
        state = files.read(source, flag)
    if state is not None and offers and offers[0].repair:
        state = offers[0].repair(state)
    construct = partial(_construct, zoo, name, arch, arch_flag, image_size or view.image_size)
    head: list[str] = []
    if state is not None and not strict and (has is None or num_classes not in (None, has)):
        head = files.head_keys(construct)
        has = has or files.head_classes(head, state)
    num_classes = num_classes or has or 1000
    net = construct(num_classes)
    notes: tuple[str, ...] = ()
    if state is not None:
        if head and has not in (None, num_classes):
            state = files.fresh_head(net, state, head)
            notes = (f"head {has} -> {num_classes} classes, fresh",)
        files.apply(net, state, label, arch, num_classes, flag)
        label = ", ".join((label, *notes))
    view = view._replace(image_size=image_size or view.image_size)
    return Network(net, NetworkSpec(arch, num_classes, *view, weights=label), wants, zoo.taps(net), notes)


def load(folder: str | Path) -> Network:
    """The network that `save_student` wrote into `folder` (or into `folder`/student), in evaluation mode."""
    from dist_kd.models import student_folder

    where = student_folder.find(Path(folder), "the student folder")
    if where is None:
        raise ConfigError(f"`{folder}` holds no student: a folder with config.json and model.safetensors is needed")
    config = student_folder.read_config(where, "the student folder")
    return build(config.arch, config.num_classes, str(where), role="model").eval()


def _construct(zoo: Any, name: str, arch: str, flag: str, image_size: int, num_classes: int) -> Any:
    try:
        return zoo.construct(name, num_classes, image_size)
    except (ValueError, AssertionError) as error:  # a vision transformer's side must fit its patches
        raise ConfigError(
            f"`{arch}` ({flag}) cannot be built for {image_size} px and {num_classes} classes: {error}"
        ) from None


def _check_classes(label: str, arch: str, has: int, asked: int | None, flag: str) -> None:
    if asked is not None and asked != has:
        raise ConfigError(
            f"weights `{label}` of `{arch}` ({flag}) are for {has} classes, but the data have {asked}; "
            f"use weights for {asked} classes, or `{flag} none`"
        )
