"""Owns what a shard's members are: files of one key make a sample, with image and label or a mark of what is amiss.

The structure of the tar and double members are strict. Damage to one sample is marked, so that it keeps its number.
Only images, .cls and .json are looked at; whatever else is there is passed over unread. No torch.
"""

from __future__ import annotations

import json
import os
import re
import sys
from array import array
from collections import defaultdict
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

from dist_kd.data.damage import KINDS, NO_IMAGE, NO_LABEL, WRONG_LABEL, damage_of, is_marked
from dist_kd.data.tar_walk import Member, TarWalk, shown

# One row of the index, 20 bytes: where the image of a sample lies in its shard, its label, its checksum.
ROW = np.dtype([("offset", "<u8"), ("length", "<u4"), ("label", "<i4"), ("checksum", "<u4")])
MOST_IMAGE_BYTES = 128 << 20  # that are read to be decoded
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
MOST_SAMPLES = 2_000_000  # of one shard; with the next limit, a scan stays below 1 GiB whatever the shard holds
MOST_KEY_BYTES = 512 << 20  # of memory, for all keys of one shard
MOST_LABEL_BYTES = 1024  # of a .cls
MOST_JSON_BYTES = 1 << 20
MOST_CLASSES = 1_000_000  # where no list of classes says otherwise: a damaged label must not make a billion
SPELLED_OUT = 20  # samples of a shard that a scan has a sentence for, of each kind of damage
NO_JSON, JSON_WITHOUT = -3, -4  # beside the marks of damage.py: no KEY.json yet, or one that says nothing of a label


@dataclass(frozen=True)
class ShardInfo:
    """One shard. `name` is its path relative to the index's folder, or an absolute one."""

    name: str
    bytes: int
    sha256: str
    samples: int


class Marked(NamedTuple):
    """Samples of a shard that have one kind of damage."""

    count: int
    sentences: dict[int, str]  # row -> what is amiss, of the first SPELLED_OUT


class Scan(NamedTuple):
    """What is in a shard."""

    info: ShardInfo
    rows: np.ndarray  # [samples] of ROW, in the order of the tar
    keys: list[str]  # of each row
    marked: dict[str, Marked]  # by kind of damage


def checksum(image: bytes) -> int:
    """The low 32 bits of xxh3_64 of an image's bytes."""
    return xxhash.xxh3_64_intdigest(image) & 0xFFFFFFFF


def scan_shard(file: BinaryIO, where: str, name: str, num_classes: int | None = None) -> Scan:
    """What is in an open shard, which messages name by `where`; reads every byte once. OSError if reading fails.

    Without `num_classes` labels are 0 to MOST_CLASSES - 1. A sample with bad content is marked; DataError at the first
    damage to the tar's structure, at a link, a nameless member or a second image or label of a key.
    """
    walk = TarWalk(file, os.fstat(file.fileno()).st_size, where)
    samples = _Samples(walk, num_classes)
    for member in walk.members():
        samples.add(member)
    rows = samples.rows()
    info = ShardInfo(name, walk.position, walk.sha256.hexdigest(), len(rows))
    return Scan(info, rows, list(samples.keys), samples.marked(rows))


class _Samples:
    """The samples of a walk: a number for each key, and columns of numbers, which stay small by the million."""

    def __init__(self, walk: TarWalk, num_classes: int | None):
        self.walk, self.num_classes = walk, num_classes
        self.keys: dict[str, int] = {}  # key -> row
        self.key_bytes = 0
        self.offset, self.length, self.checksum = array("Q"), array("Q"), array("Q")
        self.label, self.json_label = array("q"), array("q")  # of KEY.cls and KEY.json
        self.wrong: dict[int, str] = {}  # row -> what its label is, of the first

    def add(self, member: Member) -> None:
        if _is_left_out(member.name):
            return
        key, extension = _split(member.name)
        if not key:
            self.walk.refuse(
                f"holds `{shown(member.name)}`, which has no extension, so it belongs to no sample; rename or remove it"
            )
        row = self.keys.get(key)
        if row is None:
            row = self._new(key)
        if extension in IMAGE_TYPES:
            self._image(row, key, member)
        elif extension == "cls":
            self._once(self.label[row] == NO_LABEL, "label", key, member)
            self.label[row] = self._cls(row, member)
        elif extension == "json":
            self._once(self.json_label[row] == NO_JSON, "label", key, member)
            self.json_label[row] = self._json(row, member)

    def rows(self) -> np.ndarray:
        rows = np.empty(len(self.keys), ROW)
        for column in ("offset", "length", "checksum"):
            rows[column] = np.frombuffer(getattr(self, column), "u8") if len(rows) else 0
        label, of_json = (np.frombuffer(values or array("q"), "i8") for values in (self.label, self.json_label))
        of_json = np.where(of_json <= NO_JSON, NO_LABEL, of_json)
        rows["label"] = np.where(label == NO_LABEL, of_json, label)  # KEY.cls decides where there are both
        return rows

    def marked(self, rows: np.ndarray) -> dict[str, Marked]:
        """What is amiss, by kind, with sentences for the first of each."""
        counts, sentences = dict.fromkeys(KINDS, 0), defaultdict(dict)
        numbers = np.flatnonzero(is_marked(rows))
        if len(numbers):
            keys = list(self.keys)
        for number in numbers.tolist():
            kind = damage_of(rows[number])
            counts[kind] += 1
            if counts[kind] <= SPELLED_OUT:
                sentences[kind][number] = f"shard `{self.walk.shard}` {self._said(kind, keys[number], number)}"
        return {kind: Marked(count, sentences[kind]) for kind, count in counts.items() if count}

    def _said(self, kind: str, key: str, row: int) -> str:
        key = shown(key)
        if kind == "empty":
            return f"holds an image of 0 bytes for key `{key}`"
        if kind == "missing_image":
            kinds = ", ".join("." + extension for extension in IMAGE_TYPES)
            return (
                f"has no image for key `{key}`; each sample needs KEY and one of {kinds}, and a key ends at the first "
                "dot of the file's name"
            )
        if kind == "missing_label":
            return f"has no label for key `{key}`; each sample needs KEY.cls, or KEY.json with `label`"
        return f"holds a wrong label for key `{key}`: {self.wrong.get(row, KINDS[kind])}"

    def _new(self, key: str) -> int:
        row = len(self.keys)
        self.key_bytes += sys.getsizeof(key)
        if row >= MOST_SAMPLES or self.key_bytes > MOST_KEY_BYTES:
            self.walk.refuse(
                f"has more than {MOST_SAMPLES} samples, or keys of more than {MOST_KEY_BYTES >> 20} MiB, the most that "
                "are read; cut it into several shards"
            )
        self.keys[key] = row
        for column, value in (
            (self.offset, NO_IMAGE),
            (self.length, 0),
            (self.checksum, 0),
            (self.label, NO_LABEL),
            (self.json_label, NO_JSON),
        ):
            column.append(value)
        return row

    def _image(self, row: int, key: str, member: Member) -> None:
        self._once(self.offset[row] == NO_IMAGE, "image", key, member)
        if member.size >= 2**32:
            self.walk.refuse(f"holds `{shown(member.name)}` of {member.size} bytes; an image has less than 4 GiB")
        self.offset[row], self.length[row] = member.offset, member.size
        self.checksum[row] = self.walk.checksum(member)

    def _once(self, first: bool, what: str, key: str, member: Member) -> None:
        if not first:
            self.walk.refuse(
                f"holds a second {what} for key `{shown(key)}`, `{shown(member.name)}`; keys must be unique in a shard"
            )

    def _cls(self, row: int, member: Member) -> int:
        if member.size > MOST_LABEL_BYTES:
            return self._wrong(row, member, f"has {member.size} bytes, too long for a label")
        return self._label(row, member, self.walk.data(member))

    def _json(self, row: int, member: Member) -> int:
        """The member's `label`: an integer, or a string of one."""
        if member.size > MOST_JSON_BYTES:
            return self._wrong(row, member, f"has {member.size} bytes, above the {MOST_JSON_BYTES} that are read")
        try:
            value = json.loads(self.walk.data(member))
        except (ValueError, RecursionError):  # nested without end, or a number of thousands of digits
            return self._wrong(row, member, "is not JSON")
        label = value.get("label") if isinstance(value, dict) else None
        if label is None:
            return JSON_WITHOUT
        text = label if isinstance(label, str) else json.dumps(label) if isinstance(label, int | float) else "..."
        return self._label(row, member, text.encode("utf-8", "surrogatepass"))

    def _label(self, row: int, member: Member, text: bytes) -> int:
        text = text.strip()
        if not re.fullmatch(rb"-?[0-9]{1,19}", text):
            return self._wrong(row, member, f"says label `{shown(text, 40)}`, which is not an integer")
        label, limit = int(text), self.num_classes
        if not 0 <= label < (MOST_CLASSES if limit is None else limit):
            rule = (
                f"one of 0..{MOST_CLASSES - 1} (give a list of classes, if there are more)"
                if limit is None
                else f"one of 0..{limit - 1}, as there are {limit} classes"
            )
            return self._wrong(row, member, f"says label `{label}`, which must be {rule}")
        return label

    def _wrong(self, row: int, member: Member, why: str) -> int:
        if len(self.wrong) < SPELLED_OUT:
            self.wrong[row] = f"`{shown(member.name)}` {why}"
        return WRONG_LABEL


def _split(name: str) -> tuple[str, str]:
    """(key, extension), cut at the first dot of the file's name as webdataset does; key "" if there is none."""
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    return ("", "") if dot <= base else (name[:dot], name[dot + 1 :].lower())


def _is_left_out(name: str) -> bool:
    """Whether a member is one that macOS (._X, .DS_Store) or webdataset (__X__) leave in tars."""
    base = name[name.rfind("/") + 1 :]
    first = name.partition("/")[0]
    return base.startswith("._") or base == ".DS_Store" or (len(first) > 3 and first[:2] == first[-2:] == "__")
