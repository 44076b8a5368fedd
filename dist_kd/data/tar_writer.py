"""Writes one shard: images -> a tar of KEY.jpg|png|webp and KEY.cls, byte for byte the same each time.

Runs in packing processes. Image bytes go in as they are, unless a new size or quality is asked for.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from dist_kd.errors import DataError

PART = ".partial"  # the end of a file's name while it is written
QUALITY = 90  # of JPEG and WebP where a new size makes encoding necessary
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # by content, not by the file's name


@dataclass(frozen=True)
class Shard:
    """One tar to be written: everything a packing process needs."""

    path: Path
    samples: tuple[tuple[str, str | bytes, int], ...]  # key, a path or content, label
    resize: int | None
    quality: int | None
    skip_bad: bool


def write_shard(shard: Shard) -> dict:
    """Write one tar beside its place, then move it there; returns its bytes, sha256, samples, side and `left_out`.

    `side` is the pixels of a side if all images are squares of one size, else 0. DataError for an unreadable image.
    """
    os.environ["WDS_SECURE"] = "1"  # before the import: webdataset then runs no shell commands
    import webdataset

    part = shard.path.with_name(f".{shard.path.name}{PART}")
    sizes, left_out = set(), []
    with open(part, "wb") as file:
        hashed = _Hashed(file)
        with webdataset.TarWriter(hashed, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
            for key, image, label in shard.samples:
                origin = f"{key} (embedded)" if isinstance(image, bytes) else image
                try:
                    content, extension, size = encoded(_content(image), shard.resize, shard.quality)
                except _Unreadable as error:
                    if not shard.skip_bad:
                        raise DataError(
                            f"image `{origin}` is not a readable JPEG, PNG or WebP ({error}); repair it, or leave out "
                            "such images by `--skip-bad`; finished shards are kept"
                        ) from None
                    left_out.append(origin)
                    continue
                sizes.add(size)
                writer.write({"__key__": key, extension: content, "cls": str(label).encode()})
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, shard.path)
    width, height = sizes.pop() if len(sizes) == 1 else (0, 0)
    return {
        "samples": len(shard.samples) - len(left_out),
        "bytes": shard.path.stat().st_size,
        "sha256": hashed.digest.hexdigest(),
        "side": width if width == height else 0,
        "left_out": left_out,
    }


def encoded(content: bytes, resize: int | None, quality: int | None) -> tuple[bytes, str, tuple[int, int]]:
    """(bytes, extension, (width, height)) of an image: as it is, or smaller, or encoded anew.

    `resize` alone keeps the format, and the bytes of an image whose shorter side is not above it; `quality` makes every
    image a JPEG. A camera's orientation tag is dropped without turning the pixels, since decoders here ignore it.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which is of no concern here
            image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
            width, height = image.size
            shrink = resize is not None and min(width, height) > resize
            if not shrink and quality is None:
                return content, EXTENSIONS[image.format], (width, height)
            form = "JPEG" if quality is not None or image.format == "MPO" else image.format
            image = image if image.mode in ("L", "RGB") else image.convert("RGB")
            if shrink:
                scale = resize / min(width, height)
                size = max(resize, round(width * scale)), max(resize, round(height * scale))
                image = image.resize(size, Image.Resampling.BICUBIC)
            out = io.BytesIO()
            image.save(out, form, **({} if form == "PNG" else {"quality": quality or QUALITY}))
    except Exception as error:  # Pillow raises half a dozen kinds for damage, which have no common base
        raise _Unreadable(f"{type(error).__name__}: {error}") from None
    return out.getvalue(), EXTENSIONS[form], image.size


class _Unreadable(Exception):
    """The bytes are no image."""


def _content(image: str | bytes) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        with open(image, "rb") as file:
            return file.read()
    except OSError as error:  # not the image's fault, so never left out
        raise DataError(f"image `{image}` cannot be read ({error.strerror}); run the same line again") from None


class _Hashed:
    """A file open for writing that digests what passes."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        return self.file.write(block)
