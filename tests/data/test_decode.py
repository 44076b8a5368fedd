import io
import os
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.hostile_bytes import chunk, jpeg_of_scans, png, segment
from PIL import Image

from dist_kd.data import decode
from dist_kd.data.decode import decode_image, image_shape
from dist_kd.errors import DataError

DATA = Path(os.environ.get("DIST_KD_TEST_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def gradient(height=24, width=40):
    """Smooth, so that JPEG keeps it to a few grey levels."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * y / height, 255 * x / width, 127 + 0 * x], axis=2).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def by_pillow(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


JPEGS = {
    "colour": lambda: encoded(Image.fromarray(noise(23, 37)), "JPEG", quality=90),
    "no subsampling": lambda: encoded(Image.fromarray(noise(23, 37)), "JPEG", subsampling=0),
    "progressive": lambda: encoded(Image.fromarray(noise(23, 37)), "JPEG", progressive=True),
    "grey": lambda: encoded(Image.fromarray(noise(23, 37, 1)[..., 0]), "JPEG"),
    "one pixel": lambda: encoded(Image.fromarray(noise(1, 1)), "JPEG"),
    "with comment and profile": lambda: encoded(
        Image.fromarray(noise(23, 37)), "JPEG", comment=b"x" * 300, icc_profile=b"y" * 70_000
    ),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_both_ways_give_the_same_pixels(kind, monkeypatch):
    data = JPEGS[kind]()
    fast = decode_image(data)
    assert fast.dtype == torch.uint8 and fast.shape == (3, *image_shape(data))
    assert decode._jpeg_frame(data).fast and decode._decode_jpeg is not None
    assert torch.equal(fast, by_pillow(data))
    monkeypatch.setattr(decode, "_decode_jpeg", None)  # as when torchvision no longer has it
    slow = decode_image(data)
    assert torch.equal(fast, slow) and fast.stride() == slow.stride()


def test_real_photographs():
    path = DATA / "imagenet-sample.tar"
    if not path.exists():
        pytest.skip(f"no {path}")
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.name.endswith(".JPEG")][::10]
        for member in members:
            data = tar.extractfile(member).read()
            assert torch.equal(decode_image(data), by_pillow(data))


def test_png_and_webp_are_exact():
    pixels = noise(9, 14)
    expected = torch.from_numpy(pixels).permute(2, 0, 1)
    for data in (
        encoded(Image.fromarray(pixels), "PNG"),
        encoded(Image.fromarray(pixels), "WEBP", lossless=True),
    ):
        assert torch.equal(decode_image(data), expected)
        assert image_shape(data) == (9, 14)


def test_alpha_is_dropped_and_palettes_are_coloured():
    pixels = noise(6, 7, 4)
    expected = torch.from_numpy(pixels[..., :3].copy()).permute(2, 0, 1)
    assert torch.equal(decode_image(encoded(Image.fromarray(pixels), "PNG")), expected)
    grey = noise(6, 7, 2)
    data = encoded(Image.fromarray(grey, "LA"), "PNG")
    assert torch.equal(decode_image(data), torch.from_numpy(grey[..., 0].copy()).expand(3, 6, 7))
    palette = Image.fromarray(noise(6, 7)).quantize(16)
    shown = torch.from_numpy(np.array(palette.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(decode_image(encoded(palette, "PNG")), shown)
    assert torch.equal(decode_image(encoded(palette, "PNG", transparency=bytes(range(16)))), shown)
    one_bit = Image.fromarray(noise(6, 7)).convert("1")
    assert set(decode_image(encoded(one_bit, "PNG")).unique().tolist()) == {0, 255}


def test_sixteen_bits_keep_their_upper_eight():
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    data = encoded(Image.fromarray(values), "PNG")
    assert decode_image(data)[0].tolist() == [[0, 0, 1], [128, 255, 255]]
    assert torch.equal(decode_image(data)[0], decode_image(data)[2])


def test_cmyk_goes_through_pillow():
    data = encoded(Image.fromarray(gradient()).convert("CMYK"), "JPEG", quality=95)
    assert not decode._jpeg_frame(data).fast
    difference = decode_image(data).int() - torch.from_numpy(gradient()).permute(2, 0, 1).int()
    assert difference.abs().max() < 12


@pytest.mark.parametrize("fast", [True, False])
def test_orientation_is_ignored(fast, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    plain = encoded(Image.fromarray(noise(8, 12)), "JPEG")
    turned = encoded(Image.fromarray(noise(8, 12)), "JPEG", exif=exif)
    if not fast:
        monkeypatch.setattr(decode, "_decode_jpeg", None)
    assert torch.equal(decode_image(plain), decode_image(turned))


def test_only_the_first_frame_is_shown():
    frames = [Image.fromarray(noise(5, 5)), Image.fromarray(255 - noise(5, 5))]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert torch.equal(decode_image(data), torch.from_numpy(noise(5, 5)).permute(2, 0, 1))


def png_claiming(width, height):
    """A PNG of few bytes that would be decoded to width x height."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg_claiming(width, height):
    data = bytearray(encoded(Image.fromarray(noise(16, 16)), "JPEG"))
    at = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, at + 5, height, width)
    return bytes(data)


def test_limits_are_kept_before_decoding(monkeypatch):
    monkeypatch.setattr(decode, "_decode_by_pillow", None)  # must not be reached
    monkeypatch.setattr(decode, "_decode_jpeg", None)
    for data in (png_claiming(60_000, 60_000), jpeg_claiming(60_000, 60_000)):
        with pytest.raises(DataError, match=r"`60000x60000` pixels, but 1 to 64000000"):
            decode_image(data)
    with pytest.raises(DataError, match=r"`37x23` pixels, but 1 to 850"):
        decode_image(JPEGS["colour"](), max_pixels=850)
    with pytest.raises(DataError, match=r"bytes, but at most 100"):
        decode_image(JPEGS["colour"](), max_bytes=100)
    with pytest.raises(DataError, match=r"`0x5` pixels"):
        decode_image(png_claiming(0, 5))
    with warnings.catch_warnings():  # Pillow's own limit, which other formats meet, only warns below its double
        warnings.simplefilter("ignore")
        webp = encoded(Image.new("RGB", (9000, 8000)), "WEBP", lossless=True, method=0)
    with pytest.raises(DataError, match=r"`9000x8000` pixels"):
        decode_image(webp)


def test_damaged_images_are_one_sentence():
    jpeg, png = JPEGS["colour"](), encoded(Image.fromarray(noise(40, 40)), "PNG")
    webp = encoded(Image.fromarray(noise(40, 40)), "WEBP")
    damaged = [b"", b"\xff\xd8", b"\xff\xd8\xff", b"<html>not an image</html>", b"GIF89a" + bytes(50), bytes(1000)]
    damaged += [jpeg[: len(jpeg) // 2], jpeg[:200], jpeg[2:], png[: len(png) // 2], webp[: len(webp) // 2]]
    damaged += [png_claiming(30, 30), encoded(Image.fromarray(noise(4, 4)), "BMP")]
    for data in damaged:
        with pytest.raises(DataError, match=r"no JPEG, PNG or WebP") as bad:
            decode_image(data)
        assert "\n" not in str(bad.value) and bad.value.__cause__ is None


def test_any_cut_or_flipped_bytes_give_pixels_or_a_data_error():
    rng = np.random.default_rng(0)
    originals = [JPEGS["colour"](), JPEGS["progressive"](), encoded(Image.fromarray(noise(20, 20)), "PNG")]
    originals += [encoded(Image.fromarray(noise(20, 20)), "WEBP")]
    for data in originals:
        for _ in range(60):
            broken = bytearray(data[: rng.integers(1, len(data) + 1)])
            for at in rng.integers(0, len(broken), 3):
                broken[at] = rng.integers(0, 256)
            try:
                pixels = decode_image(bytes(broken), max_pixels=10_000)
            except DataError:
                continue
            assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3


# What a file may cost

FOREIGN = ("BMP", "GIF", "TIFF", "ICO", "PPM", "TGA", "PCX", "JPEG2000", "EPS", "PDF")


@pytest.mark.parametrize("kind", [*FOREIGN, "SVG", "MPO"])
def test_other_formats_are_not_even_tried(kind):
    picture = Image.fromarray(noise(16, 16))
    if kind == "SVG":
        data = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>'
    else:
        data = encoded(picture, kind, **({"save_all": True, "append_images": [picture]} if kind == "MPO" else {}))
    if kind == "MPO":  # two JPEGs in one file: it begins as a plain one, and is that
        assert decode_image(data).shape == (3, 16, 16)
        return
    with pytest.raises(DataError, match="no JPEG, PNG or WebP"):
        decode_image(data)


def test_only_three_readers_are_reachable():
    """Neither Pillow's list of formats nor its reader of TIFF, which EXIF would need, has been asked for."""
    code = (
        "import sys, io, struct; from PIL import Image, JpegImagePlugin; from dist_kd.data import decode;"
        "exif = b'Exif\\0\\0MM\\0*' + struct.pack('>IH', 8, 9999) + bytes(60);"
        "data = io.BytesIO(); Image.new('CMYK', (9, 9)).save(data, 'JPEG', exif=exif); data = data.getvalue();"
        "sys.modules['PIL.TiffImagePlugin'] = sys.modules['PIL.MpoImagePlugin'] = None;"
        "Image.open = Image.init = Image.preinit = None;"
        "print(tuple(decode.decode_image(data).shape))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("(3, 9, 9)\n", "")


@pytest.mark.timeout(60)
def test_a_jpeg_has_a_limited_number_of_scans():
    assert decode_image(jpeg_of_scans(64, 100)).shape == (3, 64, 64)
    with pytest.raises(DataError, match="`101` scans, but at most 100"):
        decode_image(jpeg_of_scans(64, 101))
    with pytest.raises(DataError, match="`100000` scans"):  # 1 MB that would take an hour
        decode_image(jpeg_of_scans(7900, 100_000))
    # what only looks like scans: in a comment, and behind the end
    comment = segment(0xFE, b"\xff\xda" * 300)
    assert decode_image(jpeg_of_scans(64, 3, inside=comment)).shape == (3, 64, 64)
    assert decode_image(jpeg_of_scans(64, 3) + b"\xff\xda\0\x0c" * 300).shape == (3, 64, 64)
    # before the frame header there may be bytes that no marker begins with
    hidden = jpeg_of_scans(64, 101)
    with pytest.raises(DataError, match=r"`101` scans|no JPEG"):
        decode_image(hidden[:2] + b"\0\0" + hidden[2:])


def test_components_one_by_one_are_scans_too():
    """A sequential JPEG whose components come in scans of their own may repeat them."""
    frame = segment(0xC0, struct.pack(">BHHB", 8, 8, 8, 3) + bytes([1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0]))
    tables = segment(0xC4, bytes([0x00, 1] + [0] * 15) + b"\0") + segment(0xC4, bytes([0x10, 1] + [0] * 15) + b"\0")
    scans = [segment(0xDA, bytes([1, component, 0, 0, 63, 0])) + b"\x3f" for component in (1, 2, 3)]
    head = b"\xff\xd8" + segment(0xDB, bytes([0]) + bytes([1] * 64)) + frame + tables
    assert decode_image(head + b"".join(scans) + b"\xff\xd9").unique().tolist() == [128]
    with pytest.raises(DataError, match="`303` scans"):
        decode_image(head + b"".join(scans) * 101 + b"\xff\xd9")


def test_a_second_header_does_not_change_the_size():
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    with pytest.raises(DataError, match=r"24x24 first and 60000x60000 later"):
        decode_image(png(24, 24, before=ihdr))
    large = segment(0xC2, struct.pack(">BHHB", 8, 60_000, 60_000, 1) + bytes([1, 0x11, 0]))
    with pytest.raises(DataError):
        decode_image(jpeg_of_scans(16, 1).replace(b"\xff\xc4", large + b"\xff\xc4", 1))
    for kind in (b"VP8X", b"VP8L", b"VP8 "):  # the size of a canvas, and of the frame that is drawn on it
        webp = bytearray(
            encoded(Image.fromarray(noise(16, 16, 4)), "WEBP", exif=b"Exif\0\0x", lossless=kind != b"VP8 ")
        )
        at = webp.find(kind) + 8
        webp[at : at + 10] = b"\x2f" + b"\xff" * 9 if kind == b"VP8L" else webp[at : at + 4] + b"\xff\xff\xff" * 2
        with pytest.raises(DataError):
            decode_image(bytes(webp))


BOMBS = {
    "a long text": lambda: png(24, 24, before=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(60 << 20), 9))),
    "many texts": lambda: png(24, 24, before=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(900_000), 9)) * 200),
    "a profile": lambda: png(24, 24, before=chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(60 << 20), 9))),
    "a text behind": lambda: png(24, 24, after=chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(60 << 20), 9))),
    "pixels without end": lambda: png(24, 24, pixels=zlib.compress(bytes(200 << 20), 9)),
    "empty chunks": lambda: png(24, 24, before=chunk(b"teSt", b"") * 20_000),
    "9000x9000": lambda: png(9000, 9000),
    "a jpeg of 65535x65535": lambda: jpeg_claiming(65_535, 65_535),
    "frames of a PNG": lambda: png(24, 24, before=chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), after=frames(5000)),
    "frames of a WebP": lambda: encoded(
        Image.new("RGB", (8, 8)), "WEBP", save_all=True, append_images=several_colours(2000), lossless=True, method=0
    ),
}


def frames(count):
    return b"".join(
        chunk(b"fcTL", struct.pack(">IIIIIHHBB", 2 * n, 24, 24, 0, 0, 1, 1, 0, 0))
        + chunk(b"fdAT", struct.pack(">I", 2 * n + 1))
        for n in range(count)
    )


def several_colours(count):
    return [Image.new("RGB", (8, 8), (n % 256, n // 256, 9)) for n in range(count)]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_cost_no_more_than_their_pixels(kind):
    """24x24 pixels, or a refusal, within 40 MB: Pillow's own limit on texts is 64 MiB, and nobody reads them."""
    data = BOMBS[kind]()
    tracemalloc.start()
    try:
        assert decode_image(data).shape[1] <= 24
    except DataError as refused:
        assert len(str(refused)) < 300
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 40 << 20


def test_decoding_takes_at_most_twenty_bytes_a_pixel(tmp_path):
    picture = Image.new("RGB", (4000, 4000))
    images = [encoded(picture, "PNG", compress_level=1), encoded(picture, "WEBP", lossless=True, method=0)]
    images += [encoded(picture.convert(mode), "JPEG", progressive=True) for mode in ("RGB", "CMYK")]
    for number, data in enumerate(images):
        (tmp_path / str(number)).write_bytes(data)
    code = (
        "import sys, resource; from pathlib import Path; from dist_kd.data.decode import decode_image;"
        "images = [path.read_bytes() for path in Path(sys.argv[1]).iterdir()];"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "before = peak(); [decode_image(data) for data in images]; print((peak() - before) * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20 * 4000 * 4000 + (20 << 20)
