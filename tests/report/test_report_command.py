import json
import subprocess
import sys

import pytest

from dist_kd.commands.report import main
from dist_kd.errors import ConfigError


def test_one_run_gets_its_page_beside_it(make_run, capsys):
    path = make_run("run")
    assert main([str(path)]) == 0
    assert (path / "report.html").stat().st_size > 10_000
    assert f"report: {path / 'report.html'}" in capsys.readouterr().out


def test_json_to_standard_output_is_json_alone(runs, capsys, tmp_path):
    assert main([*map(str, runs), "--json", "-"]) == 0
    captured = capsys.readouterr()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    report = json.loads(captured.out, parse_constant=refuse)
    assert [group["last"]["top1"]["mean"] for group in report["groups"]] == [85.0, 88.0]
    assert report["comparisons"][0]["gap_closed_percent"] == pytest.approx(46.15, abs=0.01)
    assert report["comparisons"][0]["sentence"] in captured.err
    assert not list(tmp_path.glob("*.html"))


def test_page_and_json_files(runs, tmp_path, capsys):
    html, figures = tmp_path / "all.html", tmp_path / "all.json"
    assert main([*map(str, runs), "-o", str(html), "--json", str(figures)]) == 0
    assert html.exists() and json.loads(figures.read_text())["html"] == str(html)
    assert "Distillation helped" in capsys.readouterr().out


def test_several_runs_without_a_name_make_report_html_here(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(path) for path in runs]) == 0
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name,words", [("nowhere", "is not a folder"), ("empty", "has none of a run's files")])
def test_a_wrong_folder_is_one_sentence(tmp_path, name, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=words) as error:
        main([str(tmp_path / name)])
    assert f"`{tmp_path / name}`" in str(error.value) and "--save_path" in str(error.value)


def test_a_place_that_does_not_exist_is_said_before_any_work(make_run, tmp_path):
    path = make_run("run")
    for option in ("-o", "--json"):
        with pytest.raises(ConfigError, match="does not exist"):
            main([str(path), option, str(tmp_path / "no" / "where")])


def test_a_page_that_cannot_be_written_gives_exit_code_1(make_run, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    assert main([str(make_run("run")), "-o", str(tmp_path / "taken")]) == 1
    assert "warning" in capsys.readouterr().err


def test_the_report_needs_no_torch(make_run):
    program = (
        "import sys; from dist_kd.commands.report import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules and 'wandb' not in sys.modules; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", program, str(make_run("run"))], check=True, timeout=60)
