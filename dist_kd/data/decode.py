"""Owns the way from an image's bytes to pixels, within limits: the only place that meets untrusted bytes.

torchvision's operator reads plain JPEGs, 1.3 times as fast; Pillow reads everything else (PNG, WebP, CMYK and other odd
JPEGs), and all if that operator is gone. Both ways: the first frame, grey as three equal channels, alpha dropped (not
blended), 16 bits cut to the upper 8, and the EXIF orientation ignored; on plain JPEGs they agree to the bit, as both
are libjpeg-turbo. One thread.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision.io  # noqa: F401 (registers the operator below)
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from dist_kd.data.damage import KINDS, damage_of
from dist_kd.data.index import Index
from dist_kd.data.tar_reader import BadSample, TarReader
from dist_kd.data.tar_scan import MOST_IMAGE_BYTES
from dist_kd.errors import DataError

MAX_PIXELS = 64_000_000  # decoding takes up to 20 bytes each (JPEG 3 to 10, PNG 10, WebP 18): 1.3 GB
MAX_BYTES = MOST_IMAGE_BYTES
SIZE_SLACK = 4  # times the pixels that the index says all images have
MAX_SCANS = 100  # of a JPEG: files have 1 to 20, and 70 bytes more are 40 ms more on 64 million pixels
SCAN = b"\xff\xda"
MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
FAST_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; others are lossless, hierarchical or arithmetic
SEQUENTIAL = (0xC0, 0xC1)
RGB = 3  # torchvision's ImageReadMode.RGB

# Pillow's readers have opinions on metadata, which are nobody's concern here: what they cannot decode is a DataError.
warnings.filterwarnings("ignore", module=r"PIL\.")

# The operator itself: its Python wrapper warns, since torchvision 0.29, that a later release will drop it.
_decode_jpeg = getattr(torch.ops.image, "decode_jpeg", None)


class _Frame(NamedTuple):
    height: int
    width: int
    fast: bool = False  # an 8-bit JPEG of one or three components
    several: bool = False  # a JPEG that may have several scans: progressive, or its components one by one


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> torch.Tensor:
    """RGB pixels, uint8 [3, H, W], in memory row by row with channels last.

    DataError, before any decoding, above the limits; DataError if undecodable.
    """
    frame = _checked_frame(data, max_pixels, max_bytes)
    if frame.fast and _decode_jpeg is not None:
        try:
            return _decode_jpeg(_writable(data), RGB)
        except RuntimeError:
            pass  # Pillow may know better, and names the damage if not
    return _decode_by_pillow(data, frame)


def image_shape(data: bytes, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> tuple[int, int]:
    """(height, width) from the header alone; DataError as `decode_image`."""
    frame = _checked_frame(data, max_pixels, max_bytes)
    return frame.height, frame.width


def most_pixels(index: Index) -> int:
    """Of one image of this index: whoever holds many at once counts on the size that it gives, within limits."""
    return MAX_PIXELS if index.image_size is None else min(MAX_PIXELS, SIZE_SLACK * index.image_size**2)


class TarSamples:
    """Sample number -> pixels, read from the shards and decoded each time."""

    def __init__(self, index: Index):
        self.index = index
        self.reader = TarReader(index)
        self.max_pixels = most_pixels(index)

    def pixels(self, sample: int) -> torch.Tensor:
        """uint8 [3, H, W]. BadSample if the content is damaged; DataError if the shard cannot be read."""
        return self._of(sample, decode_image)

    def shape(self, sample: int) -> tuple[int, int]:
        """(height, width), from the header; errors as `pixels`."""
        return self._of(sample, image_shape)

    def _of(self, sample: int, work: Callable[[bytes, int], Any]) -> Any:
        """What `work` makes of the bytes of a sample, if the index has nothing against it."""
        _, row = self.index.locate(sample)
        if kind := damage_of(row):
            raise BadSample(f"{self.reader.name(sample)} is damaged: {KINDS[kind]}; mend it and index again", kind)
        if row["length"] > MAX_BYTES:  # before it is read
            raise self.bad(sample, DataError(f"it has `{row['length']}` bytes, but at most {MAX_BYTES} are accepted"))
        data = self.reader.read(sample)
        try:
            return work(data, self.max_pixels)
        except DataError as error:
            raise self.bad(sample, error) from None

    def bad(self, sample: int, error: DataError) -> BadSample:
        return BadSample(f"{self.reader.name(sample)} cannot be decoded: {error}; replace it and repack", "decode")

    @property
    def retries(self) -> int:
        return self.reader.retries


def _checked_frame(data: bytes, max_pixels: int, max_bytes: int) -> _Frame:
    if len(data) > max_bytes:
        raise DataError(f"the image has `{len(data)}` bytes, but at most {max_bytes} are accepted")
    frame = _jpeg_frame(data) or _png_frame(data) or _webp_frame(data) or _any_frame(data)
    if not 0 < frame.height * frame.width <= max_pixels:
        raise DataError(f"the image has `{frame.width}x{frame.height}` pixels, but 1 to {max_pixels} are accepted")
    if frame.several and data.count(SCAN) > MAX_SCANS and (scans := _scans(data)) > MAX_SCANS:
        raise DataError(f"the image has `{scans}` scans, but at most {MAX_SCANS} are accepted")
    return frame


def _jpeg_frame(data: bytes) -> _Frame | None:
    """The frame header of a JPEG; None if this is none, or none that says its size."""
    if data[:2] != b"\xff\xd8":
        return None
    at, frame, components = 2, None, 0
    while at + 10 <= len(data) and data[at] == 0xFF:
        kind = data[at + 1]
        if kind == 0xFF:  # padding
            at += 1
        elif kind == 0x01 or 0xD0 <= kind <= 0xD7:  # markers without a segment
            at += 2
        elif kind == 0xD9:
            break
        elif kind == SCAN[1]:
            # the first scan: the last one too if it has all components and nothing is refined
            return frame and frame._replace(several=frame.several or data[at + 4] < components)
        else:
            if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
                bits, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
                fast = kind in FAST_FRAMES and bits == 8 and components in (1, 3)
                frame = _Frame(height, width, fast, several=kind not in SEQUENTIAL)
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return frame and frame._replace(several=True)


def _png_frame(data: bytes) -> _Frame | None:
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or len(data) < 24:
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return _Frame(height, width)


def _webp_frame(data: bytes) -> _Frame | None:
    """The size of the canvas, from the first chunk."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        both = int.from_bytes(data[21:25], "little")
        width, height = (both & 0x3FFF) + 1, (both >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return _Frame(height, width)


def _any_frame(data: bytes) -> _Frame:
    """As Pillow reads the header: of JPEGs with something unusual before it."""
    try:
        image = _opened(data)
    except Exception as error:
        raise _undecodable(data, error) from None
    return _Frame(image.height, image.width, several=True)


def _scans(data: bytes) -> int:
    """How often a JPEG's decoder goes over its pixels."""
    at, scans = 2, 0
    while match := MARKER.search(data, at):  # passes over pixels, in which FF comes before 00 or D0..D7 only
        kind, at = match[1][0], match.end()
        if kind == 0xD9:
            break
        scans += kind == SCAN[1]
        if kind not in (0x01, 0xD8):
            at += int.from_bytes(data[at : at + 2], "big")
    return scans


class _Jpeg(JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Nobody asks for it, and it would take a TIFF reader to untrusted bytes."""


def _opened(data: bytes) -> Image.Image:
    """By its reader's name: Image.open would also try others, as some JPEGs hold several images."""
    kinds = {b"\xff\xd8\xff": _Jpeg, b"\x89PN": PngImageFile, b"RIF": WebPImageFile}
    if data[:3] not in kinds:
        raise ValueError("they begin like none of these")
    return kinds[data[:3]](io.BytesIO(data))


def _decode_by_pillow(data: bytes, frame: _Frame) -> torch.Tensor:
    try:
        image = _opened(data)
        width, height = image.size
        if (height, width) != frame[:2]:  # nothing is allocated yet
            raise ValueError(f"they say {frame.width}x{frame.height} first and {width}x{height} later")
        image.load()
        if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # else Pillow warns
        if image.mode != "RGB":
            image = image.convert("RGB")
        pixels = image.tobytes()
    except MemoryError:
        raise
    except Exception as error:  # what Pillow raises on damaged bytes is not listed anywhere
        raise _undecodable(data, error) from None
    return _writable(pixels).view(height, width, 3).permute(2, 0, 1)


def _writable(data: bytes) -> torch.Tensor:
    """uint8 [len(data)], a copy: torch warns about memory that it cannot write to."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _undecodable(data: bytes, error: Exception) -> DataError:
    said = str(error).splitlines()[0][:100] if str(error) and "BytesIO" not in str(error) else type(error).__name__
    return DataError(f"{len(data)} bytes that begin with `{ascii(data[:8])[2:-1]}` are no JPEG, PNG or WebP ({said})")
