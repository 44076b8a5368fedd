"""Settings, weights, student folders and records of runs that mean harm: one sentence each, at once, and no code."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from faults import hostile_bytes as hostile

from dist_kd import checkpoint
from dist_kd.cli import files, parse
from dist_kd.commands.main import main
from dist_kd.errors import MOST_LINES, CheckpointError, ConfigError, DistKDError
from dist_kd.models import build, load, save_student
from dist_kd.models.weights import UNSAFE, load_plain
from dist_kd.report import write_report

pytestmark = pytest.mark.timeout(60)
BAD_NAME = "\x1b[2J\x1b]0;owned\x07a\nconfig error: all is well\u202e"


@pytest.fixture
def canary(tmp_path):
    """A file that payloads would make; it must not be there in the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def refused(call, kind: type[DistKDError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    lines = text.split("\n")
    assert all(line.isprintable() and len(line) <= 1600 for line in lines) and len(lines) <= MOST_LINES + 1
    return text


# What all messages go through


def test_a_message_is_printable_and_bounded_whatever_it_names():
    assert str(ConfigError(f"`{BAD_NAME}` is bad")).count("\n") == 0 and str(ConfigError(BAD_NAME)).isprintable()
    assert len(str(CheckpointError("x" * 10_000))) < 1600
    many = ConfigError(*("problem",) * 1000)
    assert str(many).split("\n")[-1] == "and 960 more problems"
    assert str(pickle.loads(pickle.dumps(many))) == str(many)  # as other processes get it


# YAML

DEEP = 20_000
YAMLS = {
    "nested lists": b"lr: " + b"[" * DEEP,
    "nested lists, closed": b"lr: " + b"[" * DEEP + b"]" * DEEP,
    "nested mappings": b"lr: " + b"{a: " * 5000 + b"1" + b"}" * 5000,
    "indented": b"".join(b" " * n + b"a:\n" for n in range(300)),
    "laughs": b"a: &a [x, x]\n" + b"".join(b"b%d: &b%d [%s]\n" % (n, n, b"*a, " * 9) for n in range(99)),
    "alias of itself": b"lr: &a [*a]\nT: &b {x: *b}\nmethod_args: &c {x: *c}\n",
    "merge": b"<<: {lr: 1}\n",
    "number": b"batch_size: " + b"9" * 60_000,
    "exponent": b"batch_size: 1e999999999\n",
    "infinite": b"lr: .inf\n",
    "tag": b'lr: !!python/object/apply:os.system ["touch canary"]\n',
    "tag on all": b'!!python/object/apply:os.system ["touch canary"]\n',
    "name tag": b"lr: !!python/name:os.system x\n",
    "given twice": b"lr: 1\nlr: 2\n",
    "not UTF-8": b"data: caf\xe9\n",
    "UTF-16": "lr: 1\n".encode("utf-16"),
    "terminal": b'lr: "\\e[2J\\e]0;owned\\a\\nall is well"\n',
    "terminal in a name": b'"\\e[2Ja\\nb": 1\n',
    "many names": b"".join(b"k%d: 1\n" % n for n in range(500)),
    "long": b"# " + b"x" * (1 << 20),
    "other digits": '"batch_size": "\u0661"\n'.encode(),
}


@pytest.mark.parametrize("kind", YAMLS)
def test_settings_are_plain_or_refused_in_lines(tmp_path, canary, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a.yaml"
    file.write_bytes(YAMLS[kind])
    said = refused(lambda: parse(["--data", "digits", "--config", str(file)], {}))
    assert "a.yaml" in said


@pytest.mark.parametrize("what", ["/dev/zero", "pipe", "folder", "x" * 5000, "\0", "pipe:touch canary", "../" * 2000])
def test_settings_that_are_no_file(tmp_path, canary, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkdir("folder")
    refused(lambda: parse(["--data", "digits", "--config", what], {}))


def test_presets_and_saved_settings_are_far_below_the_limit(tmp_path):
    assert max(path.stat().st_size for path in files.PRESETS.glob("*.yaml")) < files.MAX_BYTES / 4


# Weights


@pytest.fixture(scope="module")
def network():
    return build("cnn_small", 10, "none")


def zipped(path: Path, state: dict, change=lambda name, data: data, how=zipfile.ZIP_STORED) -> Path:
    """The file that torch writes of `state`, its parts changed and packed in another way."""
    torch.save(state, path.with_suffix(".torch"))
    with zipfile.ZipFile(path.with_suffix(".torch")) as good, zipfile.ZipFile(path, "w", how) as bad:
        for name in good.namelist():
            bad.writestr(name, change(name, good.read(name)))
    return path


def overlapping(path: Path, state: dict) -> Path:
    """A zip whose directory names the same bytes many times over."""
    zipped(path, state)
    with zipfile.ZipFile(path, "a") as file:
        largest = max(file.filelist, key=lambda entry: entry.file_size)
        file.filelist += [largest] * 500
        file._didModify = True
    return path


def safetensors(header: dict | bytes, data: bytes = b"", length: int | None = None):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda path, _: path.write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + data)


def one(shape: list[int], end: int, dtype: str = "F32") -> dict:
    return {"0.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


def with_first(tensor):
    """A state dict whose first tensor is another."""

    def write(path, state):
        name = next(iter(state))
        torch.save(dict(state) | {name: tensor(state[name])}, path)

    return write


WEIGHTS = {
    "header of 2^63.safetensors": safetensors(b"{}", length=2**63),
    "header of 90 MB.safetensors": safetensors(b"{}", length=90_000_000),
    "nested.safetensors": safetensors(b'{"a":' * 50_000),
    "4 TiB.safetensors": safetensors(one([2**40], 2**42)),
    "overflowing.safetensors": safetensors(one([2**62, 2**62, 0], 0)),
    "negative.safetensors": safetensors(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234"),
    "bad dtype.safetensors": safetensors(one([1], 4, BAD_NAME), b"1234"),
    "bad names.safetensors": safetensors({BAD_NAME: one([0], 0)["0.weight"]}),
    "long names.safetensors": safetensors({"a" * 100_000: one([0], 0)["0.weight"]}),
    "not a number.safetensors": safetensors(one([0], 0) | {"__metadata__": {"a": 1}}),
    "packed.pth": lambda path, state: zipped(path, state, how=zipfile.ZIP_DEFLATED),
    "bomb.pth": lambda path, state: zipped(
        path, state, lambda name, data: bytes(64 << 20) if name.endswith(".pkl") else data, zipfile.ZIP_DEFLATED
    ),
    "overlapping.pth": overlapping,
    "4 TiB.pth": lambda path, state: torch.save({"0.weight": torch.zeros(1).expand(1 << 40)}, path),
    "sparse.pth": with_first(lambda t: t.to_sparse()),
    "meta.pth": with_first(lambda t: t.to("meta")),
    "bad names.pth": lambda path, state: torch.save({BAD_NAME: torch.zeros(1)}, path),
    "endless.pth": lambda path, state: path.symlink_to("/dev/zero"),
    "endless.safetensors": lambda path, state: path.symlink_to("/dev/zero"),
    "pipe.pth": lambda path, state: os.mkfifo(path),
    "pipe.safetensors": lambda path, state: os.mkfifo(path),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_plain_tensors_or_refused(tmp_path, network, name):
    path = tmp_path / name
    WEIGHTS[name](path, network.net.state_dict())
    said = refused(lambda: build("cnn_small", 10, str(path), role="teacher"))
    assert "--teacher-weights" in said and ("cannot be read" in said or "not a state dict" in said or "not fit" in said)


@pytest.mark.parametrize("how", ["zip", "pickle", "legacy"])
@pytest.mark.parametrize("unsafe", [False, True])
def test_code_in_weights_and_checkpoints_is_not_run(tmp_path, canary, monkeypatch, how, unsafe):
    payload = {"optimizer": hostile.Touch(canary)}
    path = tmp_path / "optimizer.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))  # torch's own
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=how == "zip")
    if unsafe:
        monkeypatch.setenv(UNSAFE, "1")
    with pytest.raises((pickle.UnpicklingError, ConfigError)):
        load_plain(path)
    refused(lambda: build("cnn_small", 10, str(path)))
    # beside good files, as in a checkpoint that verifies
    (tmp_path / "state.json").write_text(json.dumps({"state": {}}))
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {}}))
    monkeypatch.setattr(checkpoint, "state_of", lambda facts: None)
    refused(lambda: checkpoint.load(tmp_path, "cpu"), ConfigError if unsafe else CheckpointError)


WORDS = ["pipe:touch canary", "http://host.invalid/a.pth", "s3://b/a.safetensors", "file:///dev/zero", "python://x"]
WORDS += ["x" * 5000, "\0", BAD_NAME, "$(touch canary)", "hf-hub:evil/x", "~no_such_user_at_all/x.pth", "/dev/zero"]


@pytest.mark.parametrize("word", range(len(WORDS)))
def test_words_that_name_no_weights(tmp_path, canary, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    assert "--teacher-weights" in refused(lambda: build("cnn_small", 10, WORDS[word], role="teacher"))


# A student's folder


@pytest.fixture(scope="module")
def student(network, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "student"
    save_student(network, folder, classes=tuple("abcdefghij"), card="", extra={})
    return folder


CONFIGS = {
    "nested": lambda text: '{"a":' * 100_000,
    "list": lambda text: "[1]",
    "null": lambda text: "null",
    "digits": lambda text: text.replace('"num_classes": 10', '"num_classes": ' + "9" * 5000),
    "infinite size": lambda text: text.replace("32,", "1e999,").replace("32\n", "1e999\n"),
    "huge": lambda text: text + " " * (20 << 20),
    "not finite": lambda text: text.replace('"crop_pct": 1.0', '"crop_pct": NaN'),
}
CHANGES = {
    "no classes": lambda c: c.update(num_classes=0, label_names=[]),
    "classes below none": lambda c: c.update(num_classes=-1),
    "10^9 classes": lambda c: c.update(num_classes=10**9),
    "label names a text": lambda c: c.update(label_names="abcdefghij"),
    "label names objects": lambda c: c.update(label_names=[{}] * 10),
    "a mean that is none": lambda c: c["pretrained_cfg"].update(mean=[float("nan")] * 3),
    "infinite std": lambda c: c["pretrained_cfg"].update(std=[float("inf")] * 3),
    "enormous images": lambda c: c["pretrained_cfg"].update(input_size=[3, 10**9, 10**9]),
    "interpolation": lambda c: c["pretrained_cfg"].update(interpolation=BAD_NAME),
    "arch of a hub": lambda c: c["dist_kd"].update(arch="timm/hf-hub:evil/x"),
    "arch of a folder": lambda c: c["dist_kd"].update(arch="timm/local-dir:/tmp"),
    "arch a path": lambda c: c["dist_kd"].update(arch="../../etc/passwd"),
    "arch a module": lambda c: c["dist_kd"].update(arch="os.system"),
    "arch a terminal's": lambda c: c["dist_kd"].update(arch=BAD_NAME),
    "arch a list": lambda c: c["dist_kd"].update(arch=["cnn_small"]),
    "another arch": lambda c: c["dist_kd"].update(arch="cnn_medium"),
    "no section": lambda c: c.update(dist_kd=[1]),
}


@pytest.mark.parametrize("kind", [*CONFIGS, *CHANGES])
def test_a_students_description_is_checked(tmp_path, student, kind, capfd):
    folder = tmp_path / "student"
    folder.mkdir()
    os.link(student / "model.safetensors", folder / "model.safetensors")
    text = (student / "config.json").read_text()
    if kind in CHANGES:
        facts = json.loads(text)
        CHANGES[kind](facts)
        changed = json.dumps(facts)
    else:
        changed = CONFIGS[kind](text)
    assert changed != text
    (folder / "config.json").write_text(changed)
    refused(lambda: load(folder))
    assert main(["evaluate", str(folder), "--data", "digits"]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and all(line.isprintable() for line in said.splitlines())


@pytest.mark.parametrize("evaluation", [{"device_batch_size": -5}, {"mixed_precision": BAD_NAME}, 7])
def test_its_settings_of_evaluation_are_checked(tmp_path, student, evaluation, capfd):
    folder = tmp_path / "student"
    folder.mkdir()
    os.link(student / "model.safetensors", folder / "model.safetensors")
    facts = json.loads((student / "config.json").read_text())
    facts["dist_kd"]["evaluation"] = evaluation
    (folder / "config.json").write_text(json.dumps(facts))
    assert main(["evaluate", str(folder), "--data", "digits"]) == 2
    assert "tells of an evaluation that cannot be" in capfd.readouterr().err


# Records of a run, as the report reads them

SCRIPT = '"><script>alert(1)</script><img src=http://pictures.invalid/x onerror=alert(1)>'


def test_a_report_of_hostile_records_holds_no_markup_of_theirs(tmp_path):
    run = tmp_path / SCRIPT.replace("/", "")
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"name": SCRIPT, "starts": SCRIPT, "data": {SCRIPT: {"name": SCRIPT}}}))
    (run / "status.json").write_text(json.dumps({"state": SCRIPT, "message": SCRIPT}))
    summary = {"student": {"arch": SCRIPT, "last": {"top1": 5.0}}, "formula": SCRIPT, "classes": [SCRIPT]}
    (run / "summary.json").write_text(json.dumps(summary | {"teacher": {"arch": SCRIPT, SCRIPT: 1.0}}))
    (run / "config.yaml").write_text(json.dumps({"arch": SCRIPT, "method": "kd", SCRIPT: SCRIPT}))
    line = {"step": 1, "kind": "val", "val/top1": 5.0, "val/loss": 1.0, SCRIPT: 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | {"kind": SCRIPT, "step": 2}) + "\n")
    write_report([run], tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert "<script" not in html and "<img" not in html and "&lt;script&gt;" in html


RECORDS = {
    "nested": '{"a":' * 100_000,
    "digits": '{"student": ' + "9" * 5000 + "}",
    "list": "[]",
    "binary": "\udcff",
}
RECORDS |= {"infinite": '{"student": {"last": {"top1": 1e999}}}', "no figure": '{"student": {"last": {"top1": "x"}}}'}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_report_of_broken_records_is_made(tmp_path, kind):
    for name in ("run.json", "status.json", "summary.json", "compression.json", "config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes(RECORDS[kind].encode("utf-8", "surrogateescape"))
    write_report([tmp_path], tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size > 1000
