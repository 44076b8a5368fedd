"""What the first lines of a run warn of."""

import io

import pytest
from PIL import Image

from dist_kd.commands.pack import main as pack
from dist_kd.train import main as train

WORDS = [
    "--arch", "cnn_small", "--teacher-arch", "cnn_small", "--teacher-weights", "none", "--kd", "--image-size", "8",
    "--batch-size", "16", "--max-steps", "1", "--teacher-eval-samples", "16", "--workers", "0", "--cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """Two images, of one colour each, of each of 1,000 classes: one to train on, one held out."""
    where = tmp_path_factory.mktemp("thousand")
    for label in range(1000):
        content = io.BytesIO()
        Image.new("RGB", (8, 8), (label % 256, label // 4, 128)).save(content, "PNG")
        folder = where / "images" / f"class{label:03}"
        folder.mkdir(parents=True)
        for name in "ab":
            (folder / f"{name}.png").write_bytes(content.getvalue())
    assert pack([str(where / "images"), str(where / "shards"), "--val-fraction", "0.5", "--jobs", "1"]) == 0
    return where / "shards"


@pytest.mark.parametrize(
    ("classes", "settings", "warned"),
    [
        (1000, ["--T", "4", "--w", "0.9"], True),
        (1000, ["--T", "2", "--w", "0.9"], False),
        (10, ["--T", "4", "--w", "0.9"], False),
    ],
)
def test_a_harmful_kd_names_the_better_preset(thousand, digits, tmp_path, capsys, classes, settings, warned):
    data = thousand if classes == 1000 else digits
    assert train([*WORDS, *settings, "--data", str(data), "--save-path", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out.splitlines()
    header = said[: next(k for k, line in enumerate(said) if line.startswith("order "))]
    assert any(f", {classes} classes, 8 px" in line for line in header)
    lines = [line for line in header if line.startswith("WARNING: kd ")]
    if warned:
        (line,) = lines
        assert line.startswith("WARNING: kd with T 4 and w 0.9 on 1,000 classes")
        assert line.endswith("better: --config imagenet_dist")
    else:
        assert not lines and not any("imagenet_dist" in line for line in said)
