"""The folder a student is handed on in: complete, plain, and readable by others."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from safetensors import safe_open

from dist_kd.errors import ConfigError
from dist_kd.models import build, load, save_student

CLASSES = ("cat", "dog", "emu")


def trained(arch: str, **options):
    torch.manual_seed(2)
    network = build(arch, len(CLASSES), **options)
    for _ in range(2):  # so that running statistics are not the initial ones
        network(torch.randn(4, 3, network.spec.image_size, network.spec.image_size))
    return network.eval()


@pytest.mark.parametrize(
    ("arch", "size"),
    [
        ("cnn_small", 8),
        ("resnet18_cifar", 32),
        ("efficientnet_b0", 32),
        ("torchvision/efficientnet_b0", 32),
        ("timm/vit_tiny_patch16_224", 48),
        ("timm/mobilenetv3_small_050", 64),
    ],
)
def test_comes_back_the_same(tmp_path, arch, size):
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    network = trained(arch, image_size=size)
    network.spec = dataclasses.replace(network.spec, mean=(0.1, 0.2, 0.3), crop_pct=0.9)
    save_student(network, tmp_path / "student", classes=CLASSES, card="# card\n", extra={"top1": 71.5})
    again = load(tmp_path / "student")
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(again(images).logits, network(images).logits)
    assert not again.training
    assert dataclasses.replace(again.spec, weights="none") == network.spec


def test_holds_three_plain_files_with_bare_names(tmp_path):
    network = trained("efficientnet_b0", image_size=32).to(memory_format=torch.channels_last)
    folder = tmp_path / "student"
    save_student(network, folder, classes=CLASSES, card="# card\n", extra={"T": 4.0})
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert {oct(p.stat().st_mode & 0o777) for p in folder.iterdir()} == {"0o644"}
    assert os.stat(folder).st_mode & 0o777 == 0o755
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(network.net.state_dict())
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "efficientnet_b0" and config["num_classes"] == 3
    assert config["label_names"] == list(CLASSES)
    shown = config["pretrained_cfg"]
    assert shown["input_size"] == [3, 32, 32] and shown["interpolation"] == "bicubic"
    assert config["dist_kd"]["arch"] == "efficientnet_b0" and config["dist_kd"]["T"] == 4.0
    assert (folder / "README.md").read_text() == "# card\n"


@pytest.mark.parametrize(("name", "size"), [("resnet10t", 64), ("vit_tiny_patch16_224", 48)])
def test_timm_reads_it(tmp_path, name, size):
    timm = pytest.importorskip("timm")
    network = trained(f"timm/{name}", image_size=size)
    network.spec = dataclasses.replace(network.spec, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.8)
    save_student(network, tmp_path / "student", classes=CLASSES, card="", extra={})
    theirs = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(theirs(images), network(images).logits)
    shown = timm.data.resolve_model_data_config(theirs)
    assert tuple(shown["input_size"]) == (3, size, size) and shown["crop_pct"] == 0.8
    assert tuple(shown["mean"]) == (0.1, 0.2, 0.3) and tuple(shown["std"]) == (0.4, 0.5, 0.6)
    assert theirs.pretrained_cfg["label_names"] == list(CLASSES)


def test_replaces_the_old_one_whole(tmp_path):
    first, second = trained("cnn_small"), trained("cnn_medium")
    folder = tmp_path / "student"
    save_student(first, folder, classes=CLASSES, card="first", extra={})
    (folder / "stray").write_text("x")
    save_student(second, folder, classes=CLASSES, card="second", extra={})
    assert load(folder).spec.arch == "cnn_medium"
    assert not (folder / "stray").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["student"]  # no temporary folder is left


def test_a_failure_leaves_the_old_one(tmp_path):
    network, folder = trained("cnn_small"), tmp_path / "student"
    save_student(network, folder, classes=CLASSES, card="first", extra={})
    with pytest.raises(TypeError):
        save_student(network, folder, classes=CLASSES, card="second", extra={"not": object()})
    assert (folder / "README.md").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["student"]


def test_class_names_must_be_as_many_as_classes(tmp_path):
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        save_student(trained("cnn_small"), tmp_path / "student", classes=("a", "b"), card="", extra={})


def test_a_compiled_student_is_saved_bare(tmp_path):
    network = trained("cnn_small")
    keys = set(network.net.state_dict())
    network.net = torch.compile(network.net, backend="eager")
    save_student(network, tmp_path / "student", classes=CLASSES, card="", extra={})
    with safe_open(tmp_path / "student" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == keys


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("dist_kd"),
        lambda c: c["pretrained_cfg"].pop("mean"),
        lambda c: c["pretrained_cfg"].update(std=[0, 1, 1]),
        lambda c: c["pretrained_cfg"].update(crop_pct=7),
        lambda c: c["pretrained_cfg"].update(input_size=[3]),
        lambda c: c["pretrained_cfg"].update(mean="abc"),
        lambda c: c.update(label_names=["only one"]),
    ],
)
def test_a_damaged_description_is_a_sentence(tmp_path, damage):
    save_student(trained("cnn_small"), tmp_path / "student", classes=CLASSES, card="", extra={})
    path = tmp_path / "student" / "config.json"
    config = json.loads(path.read_text())
    damage(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="does not describe a student of dist_kd"):
        load(tmp_path / "student")


def test_loading_what_is_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="holds no student"):
        load(tmp_path / "nothing")
