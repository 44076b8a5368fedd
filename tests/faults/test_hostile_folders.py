"""Image folders that mean harm: links are followed, as folders of links are in common use, but never in circles."""

import os
from pathlib import Path

import pytest
from faults import hostile_bytes as hostile

from dist_kd.commands.main import main
from dist_kd.data.finding import open_data
from dist_kd.data.memory import MemorySamples

pytestmark = pytest.mark.timeout(60)
SECRET = b"-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            (folder / name / f"{number}.png").write_bytes(hostile.encoded("PNG", number=number))
    return folder


def packed(images: Path, capfd) -> tuple[int, str]:
    code = main(["pack", str(images), str(images.parent / "shards"), "--jobs", "1", "--val-fraction", "0.3"])
    said = capfd.readouterr().err
    assert "Traceback" not in said and all(line.isprintable() for line in said.splitlines())
    return code, said


def test_links_to_images_and_folders_elsewhere_are_followed(images, tmp_path, capfd):
    (images / "dog").rename(tmp_path / "elsewhere")
    (images / "dog").symlink_to(tmp_path / "elsewhere")
    (images / "cat" / "more.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert packed(images, capfd)[0] == 0
    shards = tmp_path / "shards"
    assert sum(open_data(str(shards / split)).num_samples for split in ("train", "val")) == 7
    assert MemorySamples(open_data(str(shards / "train"))).pixels(0).shape == (3, 8, 8)


@pytest.mark.parametrize("target", [".", "..", "../cat", "../.."])
def test_circles_are_refused(images, capfd, target):
    (images / "cat" / "again").symlink_to(target)
    code, said = packed(images, capfd)
    assert code == 3 and "is a link to a folder that it lies in" in said


def test_a_link_to_what_is_no_image_packs_nothing_of_it(images, tmp_path, capfd):
    (tmp_path / "key").write_bytes(SECRET)
    (images / "cat" / "x.png").symlink_to(tmp_path / "key")
    code, said = packed(images, capfd)
    assert code == 3 and "x.png" in said
    assert not any(SECRET in path.read_bytes() for path in tmp_path.glob("shards/**/*") if path.is_file())


@pytest.mark.parametrize("what", ["pipe", "device", "nowhere", "folder"])
def test_images_that_are_no_files(images, capfd, what):
    path = images / "cat" / "x.png"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
        (path / "y.png").write_bytes(hostile.encoded("PNG"))
    else:
        path.symlink_to({"device": "/dev/zero", "nowhere": "/nowhere"}[what])
    code, said = packed(images, capfd)
    assert (code, "x.png" in said) == ((0, False) if what == "folder" else (3, True))


@pytest.mark.parametrize("name", ["\x1b[2J\x1b]0;owned\x07", "a\nall is well", "-rf", "$(touch canary)", "\u202egpj"])
def test_names_are_shown_as_text(images, capfd, monkeypatch, name):
    monkeypatch.chdir(images.parent)
    (images / name).mkdir()
    (images / name / f"{name}.png").write_bytes(b"no image")
    code, said = packed(images, capfd)
    assert code == 3 and name[:2] in (said if name.isprintable() else name)
    assert not Path("canary").exists()
