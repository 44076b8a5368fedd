"""Every kind of damage to shards, on packed digits: `dist-kd verify` names it, and training refuses or counts it."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data.tars import STRUCTURE, flipped, tar_of
from faults.epochs import SHARD, damaged_shard, epoch, members_of
from PIL import Image

from dist_kd.commands.main import main
from dist_kd.data.damage import KINDS
from dist_kd.data.finding import check_present, open_data
from dist_kd.data.survey import verify_index
from dist_kd.errors import DataError

# Damage to bytes that no sample is read from: an index made before does without them, so training is not harmed.
HARMLESS = {"bit in a name", "bit in a size", "header zeroed", "gzip"}
# batches of 50 of 150 samples: all are shown
TRAIN = ["--arch", "cnn_small", "--image-size", "8", "--batch-size", "50", "--epochs", "1", "--workers", "0", "--cpu"]


def verified(capsys, where: Path) -> str:
    """What `dist-kd verify` says of damaged data."""
    capsys.readouterr()
    assert main(["verify", "--jobs", "1", str(where)]) == 3
    return capsys.readouterr().err


# structure: refused


@pytest.mark.parametrize("damage", STRUCTURE)
def test_structure_of_a_packed_shard(packed, damage, capsys):
    shard = damaged_shard(packed / "train")
    change, message = STRUCTURE[damage]
    before = epoch(open_data(str(packed / "train")))
    shard.write_bytes(change(shard.read_bytes()))
    said = verified(capsys, packed / "train")
    assert str(shard) in said and re.search(message, said)
    index = open_data(str(packed / "train"))
    assert index.num_samples == 150
    if damage in HARMLESS:
        assert all(torch.equal(*pair) for pair in zip(before, epoch(index), strict=True))
        return
    for attempt in (lambda: epoch(index), lambda: epoch(index, in_memory=True), lambda: check_present(index)):
        with pytest.raises(DataError, match=rf"shard `{shard}` has \d+ bytes where (the|its) index says \d+"):
            attempt()


@pytest.mark.parametrize("damage", [*STRUCTURE, "missing"])
def test_structure_of_a_foreign_shard(foreign, damage, capsys):
    shard = damaged_shard(foreign)
    pattern = f"{foreign}/digits-train-{{000000..000002}}.tar"
    if damage == "missing":
        message = r"1 of 3 shards are missing"
        shard.unlink()
    else:
        change, message = STRUCTURE[damage]
        shard.write_bytes(change(shard.read_bytes()))
    said = verified(capsys, Path(pattern))
    assert str(shard) in said and re.search(message, said)
    with pytest.raises(DataError, match=message):
        open_data(pattern)
    assert not (foreign / ".dist_kd").exists() and not list(foreign.glob("index*"))


def test_a_packed_shard_that_is_missing(packed, capsys):
    shard = damaged_shard(packed / "train")
    shard.unlink()
    assert f"shard `{shard}` cannot be read" in verified(capsys, packed / "train")
    index = open_data(str(packed / "train"))
    for attempt in (lambda: epoch(index), lambda: check_present(index)):
        with pytest.raises(DataError, match=rf"{shard}.*No such file"):
            attempt()


def test_a_packed_shard_in_place_of_another(packed, capsys):
    first, shard, _ = sorted((packed / "train").glob("*.tar"))
    shard.write_bytes(first.read_bytes())
    assert f"shard `{shard}` has" in verified(capsys, packed / "train")
    index = open_data(str(packed / "train"))
    with pytest.raises(DataError, match=str(shard)):  # another length, or more damage than may be
        batch = epoch(index)
        assert batch[1].sum() == 150


def test_an_index_of_two_packings(packed, origin, capsys):
    """index.json and index.npy that do not belong together: told by verify, and by training before step 1."""
    shutil.copy(packed / "val" / "index.npy", packed / "train" / "index.npy")
    assert "index.npy" in verified(capsys, packed / "train")
    assert main(["train", *TRAIN, "--data", str(packed), "--save-path", str(packed / "run")]) == 3
    assert "index" in capsys.readouterr().err


# content of a packed set


def test_a_flipped_image_of_a_packed_set(packed, capsys):
    index = open_data(str(packed / "train"))
    before = epoch(index)
    sample = int(index.ends[SHARD - 1]) + 7
    shard, row = damaged_shard(packed / "train"), index.rows[sample]
    shard.write_bytes(flipped(shard.read_bytes(), int(row["offset"]) + 40))
    said = verified(capsys, packed / "train")
    assert "has another sha256 than the index says" in said
    assert f"sample {sample} (row 7, key `" in said and "(checksum)" in said
    for in_memory in (False, True):
        labels, weights, images = epoch(open_data(str(packed / "train")), in_memory=in_memory)
        assert weights.tolist() == [float(number != sample) for number in range(150)]
        good = weights > 0
        assert torch.equal(labels[good], before[0][good]) and torch.equal(images[good], before[2][good])
        assert torch.equal(images[sample], before[2][sample - 1])  # the nearest earlier good one
        with pytest.raises(DataError, match=rf"sample {sample} of shard `{shard}` has other bytes"):
            epoch(open_data(str(packed / "train")), in_memory=in_memory, max_bad_fraction=0)


def test_a_flipped_label_of_a_packed_set(packed, capsys):
    """Labels are those of the index, so training is not harmed; verify says what the shard has become."""
    before = epoch(open_data(str(packed / "train")))
    shard = damaged_shard(packed / "train")
    with tarfile.open(shard) as tar:
        member = next(member for member in tar if member.name.endswith(".cls"))
    data = bytearray(shard.read_bytes())
    data[member.offset_data] ^= 1
    shard.write_bytes(data)
    said = verified(capsys, packed / "train")
    assert f"has other labels than the index says: 1, the first of key `{member.name[:-4]}`" in said
    assert all(torch.equal(*pair) for pair in zip(before, epoch(open_data(str(packed / "train"))), strict=True))
    data[member.offset_data] = ord("q")
    shard.write_bytes(data)
    assert f"wrong label for key `{member.name[:-4]}`" in verified(capsys, packed / "train")


def test_any_flipped_byte_of_a_packed_set(packed):
    """Wherever it is: verify sees it, and no epoch is wrong without a word."""
    index = open_data(str(packed / "train")).select([SHARD])
    before = epoch(index)
    shard = damaged_shard(packed / "train")
    whole = shard.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 60).tolist():
        shard.write_bytes(flipped(whole, at))
        problems = verify_index(index, decode=len)
        assert problems and all(str(shard) in problem for problem in problems), f"byte {at}"
        labels, weights, images = epoch(index)
        good = weights > 0
        assert (~good).sum() <= 1
        assert torch.equal(labels[good], before[0][good]) and torch.equal(images[good], before[2][good])


# content of foreign shards


def changed(members: list[tuple[str, bytes]], key: str, kind: str, made_of) -> list[tuple[str, bytes]]:
    """The members with KEY.kind made of its data by made_of(data), or left out where that is None."""
    ours = f"{key}.{kind}"
    made = [(name, made_of(data) if name == ours else data) for name, data in members]
    return [(name, data) for name, data in made if data is not None]


def dotted(members, key):
    return [(name.replace(key, f"{key}.5"), data) for name, data in members]


# what happens to one sample -> (the members then, kind of damage, what the sentence says)
CONTENT = {
    "no label": (lambda m, k: changed(m, k, "cls", lambda d: None), "missing_label", "no label for key"),
    "no image": (lambda m, k: changed(m, k, "png", lambda d: None), "missing_image", "no image for key"),
    "a dot in the key": (dotted, "missing_image", "a key ends at the first dot"),
    "image of 0 bytes": (lambda m, k: changed(m, k, "png", lambda d: b""), "empty", "image of 0 bytes"),
    "label no number": (lambda m, k: changed(m, k, "cls", lambda d: b"cat"), "label", "`cat`"),
    "label negative": (lambda m, k: changed(m, k, "cls", lambda d: b"-1"), "label", "`-1`"),
    "label absurd": (lambda m, k: changed(m, k, "cls", lambda d: b"2147483647"), "label", "`2147483647`"),
    "image cut": (lambda m, k: changed(m, k, "png", lambda d: d[: len(d) // 2]), "decode", "cannot be decoded"),
    "image of zeros": (lambda m, k: changed(m, k, "png", lambda d: bytes(len(d))), "decode", "cannot be decoded"),
    "image of a web page": (lambda m, k: changed(m, k, "png", lambda d: b"<html>" * 20), "decode", "cannot be decoded"),
}


@pytest.mark.parametrize("damage", CONTENT)
def test_content_of_a_foreign_shard(foreign, damage, capsys, caplog):
    change, kind, message = CONTENT[damage]
    shard = damaged_shard(foreign)
    members = members_of(shard)
    key = members[14][0].rpartition(".")[0]  # the eighth sample
    before = epoch(open_data(str(foreign)))
    shutil.rmtree(foreign / ".dist_kd")
    tar_of(shard, change(members, key))

    index = open_data(str(foreign))
    sample = index.ends[SHARD - 1] + 7
    assert index.num_samples == 150 and len(index.classes) == 10  # never another number without a word
    if kind != "decode":  # seen as the shards are indexed
        assert f"1 of 150 samples in `{foreign}` are damaged (1 {kind})" in caplog.text and message in caplog.text
    said = verified(capsys, foreign)
    assert str(shard) in said and f"key `{key}`" in said and message in said
    for in_memory in (False, True):
        labels, weights, images = epoch(index, in_memory=in_memory)
        assert weights.tolist() == [float(number != sample) for number in range(150)]
        good = weights > 0
        assert torch.equal(labels[good], before[0][good]) and torch.equal(images[good], before[2][good])
        assert labels[sample] == labels[sample - 1] and torch.equal(images[sample], images[sample - 1])
        with pytest.raises(DataError, match=f"sample {sample} of shard `{shard}`"):
            epoch(index, in_memory=in_memory, max_bad_fraction=0)


def test_foreign_shards_that_changed_since_they_were_indexed(foreign, caplog):
    """Fewer samples than before, in a shard that is well: the count never changes without a word."""
    assert open_data(str(foreign)).num_samples == 150
    assert "changed" not in caplog.text
    shard = damaged_shard(foreign)
    tar_of(shard, members_of(shard)[:-2])
    assert open_data(str(foreign)).num_samples == 149
    assert f"the shards in {foreign} have changed since they were indexed: 150 samples then, 149 now" in caplog.text


def test_all_images_first_is_no_damage(foreign, capsys):
    """webdataset loses such a shard whole."""
    before = epoch(open_data(str(foreign)))
    shutil.rmtree(foreign / ".dist_kd")
    shard = damaged_shard(foreign)
    tar_of(shard, sorted(members_of(shard), key=lambda member: member[0].endswith(".cls")))
    assert main(["verify", "--jobs", "1", str(foreign)]) == 0
    assert all(torch.equal(*pair) for pair in zip(before, epoch(open_data(str(foreign))), strict=True))


def test_indexing_by_command(foreign, capsys):
    shard = damaged_shard(foreign)
    members = members_of(shard)
    keys = [members[at][0].rpartition(".")[0] for at in (14, 20, 30)]
    members = changed(members, keys[0], "cls", lambda d: b"cat")
    members = changed(members, keys[1], "png", lambda d: None)
    tar_of(shard, changed(members, keys[2], "png", lambda d: None))
    words = ["index", "--jobs", "1", str(foreign)]
    assert main(words) == 3
    said = capsys.readouterr().err
    assert "3 of 150 samples" in said and "(2 missing_image, 1 label)" in said and "--max-bad-fraction" in said
    assert f"key `{keys[0]}`" in said and f"key `{keys[1]}`" in said and f"key `{keys[2]}`" not in said
    assert not (foreign / "index.json").exists()
    assert main([*words, "--max-bad-fraction", "0.02"]) == 0
    assert "150 samples (3 of them damaged)" in capsys.readouterr().out
    said = verified(capsys, foreign)
    assert all(f"key `{key}`" in said for key in keys) and said.count("\n") == 3
    for wrong in ("1.5", "-0.1", "x"):
        with pytest.raises(SystemExit) as refused:
            main([*words, "--max-bad-fraction", wrong])
        assert refused.value.code == 2


def test_shards_without_labels_are_refused(foreign, capsys):
    for shard in foreign.glob("*.tar"):
        tar_of(shard, [member for member in members_of(shard) if not member[0].endswith(".cls")])
    assert main(["train", *TRAIN, "--data", str(foreign), "--val-data", str(foreign)]) == 3
    said = capsys.readouterr().err
    assert "150 of 150 samples" in said and "each sample needs KEY.cls, or KEY.json with `label`" in said


def test_odd_images_are_well(tmp_path, capsys):
    """CMYK, 16 bits, palette, alpha, EXIF, animation: legal, so no damage."""
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        "jpg": [(image.convert("CMYK"), {}), (image, {"exif": turned}), (image, {"progressive": True})],
        "png": [(Image.fromarray(np.asarray(image).astype(np.uint16) * 900), {}), (image.convert("P"), {})],
        "webp": [(image.convert("RGBA"), {}), (image, {"save_all": True, "append_images": [image.rotate(90)]})],
    }
    members = []
    for kind, images in kinds.items():
        for number, (made, how) in enumerate(images):
            file = io.BytesIO()
            made.save(file, {"jpg": "JPEG"}.get(kind, kind.upper()), **how)
            members += [(f"{kind}{number}.{kind}", file.getvalue()), (f"{kind}{number}.cls", b"0")]
    path = tar_of(tmp_path / "odd.tar", members)
    assert main(["verify", "--jobs", "1", str(path)]) == 0
    assert epoch(open_data(str(path)))[1].tolist() == [1.0] * 7


# the whole command


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())["skipped"]


def test_training_counts_what_it_replaces(packed, capsys):
    """One image flipped after packing, of 150: within the share that may be."""
    index = open_data(str(packed / "train"))
    sample = int(index.ends[SHARD - 1]) + 7
    shard = damaged_shard(packed / "train")
    shard.write_bytes(flipped(shard.read_bytes(), int(index.rows[sample]["offset"]) + 40))
    run = packed / "run"
    words = ["train", *TRAIN, "--data", str(packed)]
    assert main([*words, "--save-path", str(run)]) == 0
    assert summary(run)["bad_samples"] == {"checksum": 1} and summary(run)["bad_samples_total"] == 1
    captured = capsys.readouterr()
    assert f"sample {sample}" in captured.out + captured.err
    assert main([*words, "--max-bad-fraction", "0", "--save-path", str(packed / "strict")]) == 3
    assert f"sample {sample} of shard `{shard}`" in capsys.readouterr().err
    assert main([*words, "--max-bad-fraction", "0.001", "--save-path", str(packed / "bounded")]) == 3
    assert "--max-bad-fraction" in capsys.readouterr().err


def test_training_counts_what_the_index_marks(foreign, packed, caplog):
    shard = damaged_shard(foreign)
    members = members_of(shard)
    key = members[14][0].rpartition(".")[0]
    tar_of(shard, changed(members, key, "cls", lambda d: b"cat"))
    run = packed / "run"
    words = ["train", *TRAIN, "--val-data", str(packed / "val"), "--data", str(foreign)]
    assert main([*words, "--save-path", str(run)]) == 0
    assert summary(run)["bad_samples"] == {"label": 1}
    assert "1 of 150 samples" in caplog.text


@pytest.mark.parametrize("damage", ["cut at a member's end", "two archives"])
def test_training_refuses_a_shard_that_is_not_that_of_its_index(packed, damage, capsys):
    shard = damaged_shard(packed / "train")
    shard.write_bytes(STRUCTURE[damage][0](shard.read_bytes()))
    assert main(["train", *TRAIN, "--data", str(packed), "--save-path", str(packed / "run")]) == 3
    assert f"shard `{shard}` has" in capsys.readouterr().err


def test_every_kind_is_tested():
    assert {kind for _, kind, _ in CONTENT.values()} | {"checksum"} == set(KINDS)
