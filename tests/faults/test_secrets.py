"""A canary where secrets are: it is in nothing that a run leaves or says, however it ended. Bound: 60 s a run."""

import json
from pathlib import Path

import pytest
import yaml
from data.bad_server import BadServer, status
from faults.zygote import SMALL, free_port

from dist_kd.cli import parse
from dist_kd.commands.main import main
from dist_kd.errors import ConfigError

CANARY = "cAnArY5ecret"
VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GITHUB_TOKEN", "MY_PASSWORD")


def assert_nowhere(folder: Path, *but: str) -> int:
    """How many files were looked into: names and contents, all of the folder except files of the names in `but`."""
    seen = 0
    for path in folder.rglob("*"):
        assert CANARY not in path.name
        if path.is_file() and path.name not in but:
            seen += 1
            assert CANARY.encode() not in path.read_bytes(), path
    return seen


def job(folder: Path, data: Path, *more: str, **facts) -> dict:
    """A run whose environment is full of secrets, in a folder that holds its home, its cache and what it says."""
    nowhere = f"me:{CANARY}@127.0.0.1:{free_port()}"
    env = dict.fromkeys(VARIABLES, CANARY * 4) | {
        "HOME": str(folder),
        "DIST_KD_CACHE": str(folder / "cache"),
        "WANDB_BASE_URL": f"http://{nowhere}",
        "http_proxy": f"http://{nowhere}",
        "no_proxy": "127.0.0.1",
        "NETRC": str(folder / "netrc"),
    }
    (folder / "netrc").write_text(f"machine 127.0.0.1 login me password {CANARY}\n")
    (folder / "netrc").chmod(0o600)
    words = [*SMALL, "--data", str(data), "--save-path", str(folder / "run"), "--wandb", "--tensorboard", *more]
    return {"words": words, "env": env, "out": str(folder / "out"), **facts}


def state(folder: Path) -> str:
    return json.loads((folder / "run" / "status.json").read_text())["state"]


def test_a_run_that_ends_well(zygote, origin, tmp_path):
    pytest.importorskip("wandb")
    assert zygote.run(job(tmp_path, origin)) == [0], (tmp_path / "out").read_text()
    assert state(tmp_path) == "done"
    assert list((tmp_path / "run" / "wandb").rglob("*.wandb")) and (tmp_path / "run" / "report.html").is_file()
    assert assert_nowhere(tmp_path, "netrc") > 15


def test_a_run_that_breaks_in_the_middle(zygote, origin, tmp_path):
    assert zygote.run(job(tmp_path, origin, at_step={"6": "exit 3"})) == [70]
    assert state(tmp_path) == "failed"
    assert "Traceback" in (tmp_path / "out").read_text() and "wandb" in (tmp_path / "out").read_text().lower()
    assert assert_nowhere(tmp_path, "netrc") > 8


def test_a_run_that_fails_at_its_start(zygote, origin, tmp_path):
    assert zygote.run(job(tmp_path, origin, "--test-data", str(tmp_path / "nothing"))) == [3]
    assert assert_nowhere(tmp_path, "netrc") >= 1


@pytest.mark.parametrize("code", [401, 403, 404, 500])
def test_a_server_that_refuses_the_password(zygote, origin, tmp_path, code):
    """It is taken from ~/.netrc and sent; the message about it says where it came from, not what it is."""
    with BadServer() as server:
        server.always["x.tar"] = status(code, Location=server.url(f"y?token={CANARY}"))  # there is no index
        assert zygote.run(job(tmp_path, server.url("x.tar"), "--loader-timeout", "3")) == [3]
        assert any(asked.path == "x.tar" and asked.authorization for asked in server.asked)
    assert len((tmp_path / "out").read_text().splitlines()) >= 1
    assert_nowhere(tmp_path, "netrc")


# What would be saved with the run is refused, and the refusal does not repeat it

URLS = [
    f"https://me:{CANARY}@host.invalid/a.tar",
    f"s3://{CANARY}@bucket/a.tar",
    f"https://host.invalid/a.tar?X-Amz-Signature={CANARY}",
    f"https://host.invalid/a.tar?sig={CANARY}",
    f"https://host.invalid/a.tar#access_token={CANARY}",
    f"http://me:{CANARY}@host.invalid:port/a.tar",
]
SETTINGS = ("data", "val_data", "test_data", "teacher_weights", "student_weights", "save_path", "wandb_project", "arch")


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_urls_with_credentials_are_refused_in_any_setting(tmp_path, setting, url):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({setting: url}))
    base = [] if setting == "data" else ["--data", "digits"]
    asked = [([*base, f"--{setting.replace('_', '-')}", url], {}), ([*base, "--config", str(file)], {})]
    asked += [([], {"DIST_KD_DATA": url})] if setting == "data" else []
    for argv, env in asked:
        with pytest.raises(ConfigError) as caught:
            parse(argv, env)
        assert CANARY not in str(caught.value) and "give the credentials outside" in str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--wandb-api-key", CANARY],
        ["train", f"--token={CANARY}"],
        ["train", "--hf_token", CANARY, "--data", "digits"],
        ["train", "--config", f"https://me:{CANARY}@host/x.yaml"],
        ["train", "--config", f"https://host/x.yaml?token={CANARY}"],
        ["evaluate", "cnn_small", f"--api-key={CANARY}"],
        ["evaluate", "cnn_small", "--data", URLS[0]],
        ["pack", "digits", "x", f"--password={CANARY}"],
        ["index", URLS[0]],
        ["verify", URLS[2]],
        ["sweep", "--over", "T=1,2", "--secret", CANARY],
        ["sweep", "--over", "T=1,2", "--data", URLS[0]],
    ],
)
def test_no_command_repeats_a_secret(argv, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    said = capfd.readouterr()
    assert CANARY not in said.out + said.err and "error" in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_settings_that_holds_one(tmp_path, capfd):
    file = tmp_path / "settings.yaml"
    file.write_text(f"wandb_api_key: {CANARY}\npassword: {CANARY}\n")
    assert main(["train", "--data", "digits", "--config", str(file)]) == 2
    said = capfd.readouterr().err
    assert CANARY not in said and said.count("secrets are not taken from files of settings") == 2
