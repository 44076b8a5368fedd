import io
import random
import tarfile

import pytest
from data.tars import END, GLOBAL, LONG_LINK, LONG_NAME, PAX, STRUCTURE, block_of, checked, record, scan

from dist_kd.data import tar_walk
from dist_kd.data.tar_walk import TarWalk
from dist_kd.errors import DataError

# what is read


def test_images_longer_than_what_is_read_at_once(tmp_path, monkeypatch, shards):
    (path,) = shards((9,))
    whole = scan(path)
    monkeypatch.setattr(tar_walk, "CHUNK", 7)
    pieces = scan(path)
    assert pieces.rows.tolist() == whole.rows.tolist() and pieces.info == whole.info


def test_folders_and_harmless_extended_headers(of_bytes):
    found = of_bytes(
        block_of("pax_global_header", record("comment", "0123"), GLOBAL),
        block_of("a", kind=tarfile.DIRTYPE, size=700),  # tar gives folders no data, whatever they say
        block_of("b/", kind=b"\0"),
        block_of("x", record("mtime", "1.5") + record("SCHILY.xattr.user", "y" * 600), PAX),
        block_of("a/k.jpg", b"image"),
        block_of("././@LongLink", b"elsewhere\0", LONG_LINK),
        block_of("././@LongLink", b"a/" + b"l" * 300 + b".jpg\0", LONG_NAME),
        block_of("a/lll", b"image"),
        END,
    )
    assert found.keys == ["a/k", "a/" + "l" * 300]


# damage to the structure, each kind of which some reader loses without a word


@pytest.mark.parametrize("damage", STRUCTURE)
def test_damaged_structure_is_refused(shards, damage):
    (path,) = shards((8,))
    change, message = STRUCTURE[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message) as refused:
        scan(path)
    assert f"`{path}`" in str(refused.value)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE, b"M", b"\xff"]
)
def test_what_is_no_file_is_refused(of_bytes, kind):
    with pytest.raises(DataError, match=r"holds `a.jpg` as a link or special file"):
        of_bytes(block_of("a.jpg", kind=kind), END)


# hostile headers


HOSTILE = {
    "a size beyond the file": ([block_of("a.jpg", size=8**11 - 1)], r"inside `a.jpg` \(8589934591 bytes"),
    "a negative size": ([block_of("a.jpg", size=-512)], r"inside `a.jpg` \(-512 bytes"),
    "a size of 2^70": ([block_of("a.jpg", size=2**70)], r"inside `a.jpg` \(1180591620717411303424 bytes"),
    "a size beyond the file in pax": (
        [block_of("x", record("size", "9" * 20), PAX), block_of("a.jpg", b"x")],
        r"inside `a.jpg` \(9{20} bytes",
    ),
    "a negative size in pax": ([block_of("x", record("size", "-1"), PAX), block_of("a.jpg")], r"damaged size `-1`"),
    "a size that is no number": ([block_of("x", record("size", "\u00b2"), PAX), block_of("a.jpg")], r"damaged size `"),
    "a size of 5000 digits": ([block_of("x", record("size", "1" * 5000), PAX), block_of("a.jpg")], r"damaged size `1"),
    "a record longer than its header": (
        [block_of("x", b"99 path=a.jpg\n", PAX), block_of("a.jpg")],
        r"extended header",
    ),
    "a record of length 0": ([block_of("x", b"0 path=a.jpg\n", PAX), block_of("a.jpg")], r"damaged extended header"),
    "a record without end": ([block_of("x", b"12 path=a.jpg", PAX), block_of("a.jpg")], r"damaged extended header"),
    "an extended header of 2 MB": (
        [block_of("x", record("comment", "y" * (2 << 20)), PAX), block_of("a.jpg")],
        r"extended header of \d+ bytes at byte 0",
    ),
    "an extended header beyond the file": ([block_of("x", size=2**40, kind=PAX)], r"inside `x`"),
    "a name of 5000 bytes": (
        [block_of("x", b"n" * 5000 + b".jpg", LONG_NAME), block_of("n")],
        r"name of 5004 bytes at byte 0, but 1 to 4096",
    ),
    "an empty name": ([block_of("x", b"\0", LONG_NAME), block_of("n")], r"name of 0 bytes"),
    "two names": (
        [block_of("x", b"a.jpg\0", LONG_NAME), block_of("x", record("path", "b.jpg"), PAX), block_of("n", b"x")],
        r"extended headers that contradict each other from byte 0 on",
    ),
    "names without end": ([block_of("x", b"a.jpg" + bytes(4000), LONG_NAME)] * 400, r"extended headers of more than"),
    "a name for nothing": ([block_of("a.jpg", b"x"), block_of("x", b"b.jpg", LONG_NAME)], r"without its member"),
    "a link's name for nothing": ([block_of("x", b"b.jpg", LONG_LINK)], r"without its member"),
    "a folder's name in two parts": (
        [checked(block_of("", kind=b"\0")[:345] + b"L" + bytes(166))],  # to tarfile a file of the name `L/`
        r"holds `L/`, which has no extension",
    ),
    "a name for all": ([block_of("x", record("path", "a.jpg"), GLOBAL), block_of("b.jpg")], r"sets path for all"),
    "a sparse file": (
        [
            block_of("x", record("GNU.sparse.major", "1") + record("GNU.sparse.realsize", "9" * 15), PAX),
            block_of("a.jpg"),
        ],
        r"sparse file",
    ),
    "a name that a terminal obeys": ([block_of("\x1b[2Jx")], r"holds `\\x1b\[2Jx`, which has no extension"),
    "a hidden file": ([block_of("a/.jpg")], r"holds `a/.jpg`, which has no extension"),
    "an image of 4 GiB": ([block_of("a.jpg", size=2**32)], r"inside `a.jpg`"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused(of_bytes, name):
    parts, message = HOSTILE[name]
    with pytest.raises(DataError, match=message):
        of_bytes(*parts, END)


def test_an_image_of_4_gib_is_refused_though_it_is_there(tmp_path):
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(block_of("a.jpg", size=2**32))
        file.truncate(512 + 2**32 + 1024)  # a hole: no disk is used
    with pytest.raises(DataError, match=r"holds `a.jpg` of 4294967296 bytes"):
        scan(path)


def test_numbers_that_other_readers_cannot_read_are_refused(of_bytes):
    """They would end there without a word: the checksum is right, but the mode is none."""
    first, block = block_of("a.jpg", b"x"), block_of("b.jpg", b"x")
    with pytest.raises(DataError, match=r"damaged header at byte 1024, behind `a.jpg`"):
        of_bytes(first, checked(block[:100] + b"rw-r--r-" + block[108:]), END)
    for number in (b"   644 \0", b"644\0    ", b"\x80" + bytes(6) + b"\x01", bytes(8)):  # odd, but what tarfile takes
        assert of_bytes(first, checked(block[:100] + number + block[108:]), END).keys == ["a", "b"]


def test_a_name_longer_than_its_header_says_is_refused(of_bytes):
    """Some readers take it to the size, some to the first zero."""
    block = block_of("x", b"abc.png\0", LONG_NAME)
    cut = checked(block[:124] + b"00000000005\0" + block[136:])
    assert of_bytes(block, block_of("n", b"x"), END).keys == ["abc"]
    with pytest.raises(DataError, match="name that is cut"):
        of_bytes(cut, block_of("n", b"x"), END)


# against an independent reader


def made_at_random(rng: random.Random) -> bytes:
    parts = []
    for i in range(rng.randint(1, 6)):
        parts += rng.choice(
            [
                [],
                [],
                [block_of("x", record("path", f"p{i}.jpg"), PAX)],
                [block_of("x", record("path", f"p{i}.jpg") + record("size", "3"), PAX)],
                [block_of("././@LongLink", f"l{i}".encode() * rng.randint(1, 80) + b".png\0", LONG_NAME)],
                [block_of("././@LongLink", b"elsewhere\0", LONG_LINK)],
                [block_of("g", record("comment", "c"), GLOBAL)],
                [block_of("d", kind=tarfile.DIRTYPE)],
            ]
        )
        parts += [block_of(f"k{i}.jpg", bytes(rng.randint(0, 600))), block_of(f"k{i}.txt", b"1")]
    return b"".join([*parts, END])


def changed_at_random(data: bytes, rng: random.Random) -> bytes:
    """A few bytes of headers changed, mostly with the checksum set right; blocks taken out or put in."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) // 512) * 512
        block = bytearray(data[at : at + 512])
        if (how := rng.random()) < 0.6:
            where = rng.choice([rng.randrange(512), rng.randrange(124, 157)])
            block[where] = rng.choice([0, 0x30, 0x37, 0x80, 0xFF, ord("L"), ord("x"), ord("5"), rng.randrange(256)])
            block = checked(bytes(block)) if rng.random() < 0.85 else block
        elif how < 0.8:
            block = b""
        else:
            block += bytes(rng.choice([0, 7]) for _ in range(512))
        data = data[:at] + bytes(block) + data[at + 512 :]
    return data


@pytest.mark.parametrize("seed", [*range(4), pytest.param(4, marks=pytest.mark.slow)])
def test_what_is_accepted_is_what_tarfile_reads(seed):
    """Nothing but our own errors; and where there is none, the same files at the same places."""
    rng, accepted = random.Random(seed), 0
    for _ in range(400 if seed < 4 else 10_000):
        data = changed_at_random(made_at_random(rng), rng)
        try:
            ours = [tuple(member) for member in TarWalk(io.BytesIO(data), len(data), "x").members()]
        except DataError:
            continue
        accepted += 1
        if ours:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                assert ours == [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    assert accepted > 80
