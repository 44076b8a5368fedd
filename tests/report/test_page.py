"""The page as a browser sees it."""

import json
import re
import time
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest

from dist_kd.report import write_report
from dist_kd.report.curves import SECTIONS

BROWSERS_OWN = ("google.com", "googleapis.com", "gvt1.com")  # it asks for updates and the time, whatever the page


class Dom(HTMLParser):
    """What the tests ask of a page: ids, links, figures with their curves, rows of tables, text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.curves: dict[str, list[tuple[str, int]]] = {}  # key of the plot -> (colour, points) of each line
        self.rows: list[list[str]] = []
        self.svg_text: list[str] = []
        self._figure = self._cell = None
        self._in_svg = 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [
            v for k, v in attrs.items() if k in {"src", "href", "xlink:href", "action", "data", "srcset"} and v
        ]
        self.links += re.findall(r"url\(([^)]*)\)", " ".join(v or "" for v in attrs.values()))
        if tag == "svg":
            self._in_svg += 1
        if tag == "figure":
            self._figure = self.curves.setdefault(attrs["data-key"], [])
        color = re.search(r"stroke: (var\(--s\d\))", attrs.get("style") or "")
        # a line; markers are small closed shapes in defs
        if tag == "path" and self._figure is not None and color and "fill: none" in attrs["style"]:
            self._figure.append((color[1], len(re.findall(r"[ML]", attrs["d"]))))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = self.rows[-1]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None
        if tag == "figure":
            self._figure = None
        if tag == "svg":
            self._in_svg -= 1

    def handle_data(self, data):
        if self._cell is not None:
            self._cell[-1] += data.replace("\u00a0", " ")
        if self._in_svg and data.strip():
            self.svg_text.append(data.strip())


@pytest.fixture
def page(runs, tmp_path):
    report = write_report(runs, tmp_path / "report.html")
    assert report["problems"] == []
    return tmp_path / "report.html"


def test_in_a_browser_the_page_has_its_curves_and_numbers_and_asks_nobody(page, browser, tmp_path):
    log = tmp_path / "net.json"
    dom = Dom(browser(page, f"--log-net-log={log}", "--dump-dom"))

    every = {panel.key for panels in SECTIONS.values() for panel in panels if not panel.key.startswith("test/")}
    assert dom.curves.keys() == every | {"time/step_ms"}
    for key in every:
        alone = [points for color, points in dom.curves[key] if color == "var(--s0)"]
        distilled = [points for color, points in dom.curves[key] if color == "var(--s1)"]
        only_distilled = key in {"train/loss_kd", "val/agreement"}
        assert (len(alone), len(distilled)) == (0 if only_distilled else 3, 3), key
        # 10 evaluations and 80 log points a run; matplotlib leaves out points on a straight line
        assert all(points == 10 for points in alone + distilled) or not key.startswith("val/"), key
        assert all(points >= 10 for points in alone + distilled), key
    assert {"Validation top-1 (%)", "epoch", "teacher 91.5"} <= set(dom.svg_text)

    rows = {row[0]: row for row in dom.rows}
    assert "91.50" in rows["Teacher: wide_cnn"]
    assert "85.00 \u00b1 0.50" in rows["Student alone: tiny_cnn, labels only"]
    assert "88.00 \u00b1 0.75" in rows["Student distilled: tiny_cnn, kd"]
    assert rows["Parameters"][1:] == ["10,000,000", "1,250,000", "8.00 x", "12.50 %"]

    assert len(dom.ids) == len(set(dom.ids)), "ids of several drawings must not collide"
    assert all(link.startswith("#") or link == "data:," for link in dom.links)
    own = {link[1:] for link in dom.links if link.startswith("#")}
    assert own <= set(dom.ids), "each reference must have its target"
    assert "script" not in dom.tags
    assert requested(log) == set()


def requested(log) -> set[str]:
    """Hosts that were asked for, but for the browser's own."""
    urls = re.findall(r'"url":"(https?://[^"]*)"', log.read_text())
    hosts = {urlsplit(url).hostname for url in urls}
    return {host for host in hosts if not host.endswith(BROWSERS_OWN)}


def test_a_page_that_does_ask_would_be_found_out(browser, tmp_path):
    page = tmp_path / "asking.html"
    page.write_text('<!doctype html><img src="http://pictures.invalid/x.png">')
    browser(page, f"--log-net-log={tmp_path / 'net.json'}", "--dump-dom")
    assert requested(tmp_path / "net.json") == {"pictures.invalid"}


@pytest.mark.parametrize(
    "scheme,paper,colors",
    [
        (1, (244, 245, 247), {(31, 95, 214), (194, 84, 10)}),
        (0, (14, 17, 23), {(122, 167, 255), (255, 164, 92)}),
    ],
    ids=["light", "dark"],
)
def test_the_page_is_drawn_in_the_readers_scheme(page, browser, tmp_path, scheme, paper, colors):
    from PIL import Image

    shot = tmp_path / "page.png"
    browser(page, f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1200,1400", f"--screenshot={shot}")
    with Image.open(shot) as image:
        pixels = image.convert("RGB")
        assert pixels.getpixel((3, 3)) == paper
        found = {color for _, color in pixels.getcolors(1 << 20)}
    assert colors <= found, "the curves must be drawn in the page's colours"


def test_the_file_itself_is_small_and_knows_no_address(page):
    html = page.read_text()
    assert page.stat().st_size < 1_000_000
    assert "://" not in html and "@import" not in html
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert "#0505" not in html and "#0101" not in html, "every stand-in colour must be replaced"


def test_many_long_runs_stay_under_a_megabyte_and_are_quick(make_run, tmp_path):
    lines = None
    paths = [make_run(f"run{i}", seed=i % 6, kd=i >= 6, log_every=1) for i in range(12)]
    for path in paths:  # 4,000 log points each
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        stretched = [line | {"step": line["step"] * 10 + k} for line in lines for k in range(10)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in stretched))
    start = time.process_time()
    report = write_report(paths, tmp_path / "report.html")
    assert report["problems"] == []
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert "log points" in (tmp_path / "report.html").read_text()
    assert time.process_time() - start < 15


def test_one_run_is_quick_enough_for_the_end_of_training(make_run):
    path = make_run("run", seed=0, resumed=100)
    start = time.process_time()
    write_report([path], path / "report.html")
    assert time.process_time() - start < 3  # of processor time: a busy machine is not our doing


def test_markup_in_names_stays_text(make_run, browser, tmp_path):
    evil = "<script>alert(1)</script><img src=http://pictures.invalid/x>"
    path = make_run("run", seed=0, arch=evil)
    facts = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(
        json.dumps(facts | {"name": evil, "versions": {evil: evil}, "git": {"revision": evil}})
    )
    assert write_report([path], tmp_path / "r.html")["problems"] == []
    dom = Dom((tmp_path / "r.html").read_text())
    assert "script" not in dom.tags and "img" not in dom.tags
    assert any(evil in cell for row in dom.rows for cell in row)


def test_a_running_run_is_shown_with_what_is_missing(make_run, tmp_path):
    path = make_run("going", steps=130, state="running")
    (path / "compression.json").unlink(missing_ok=True)
    write_report([path], tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert "going: summary.json is not there: it has not finished" in html
    dom = Dom(html)
    assert [points for _, points in dom.curves["val/top1"]] == [3]
    assert "so far" in next(row for row in dom.rows if row[0].startswith("Student distilled"))


def test_a_test_set_has_its_curves_and_its_cards(make_run, tmp_path):
    paths = [make_run("plain", kd=False, final=85.0, test="t"), make_run("kd", final=88.0, test="t")]
    report = write_report(paths, tmp_path / "r.html")
    page = Dom((tmp_path / "r.html").read_text())
    assert report["problems"] == [] and report["runs"][1]["test"]["highest"]["top1"] == 99.5
    assert {"test/top1", "test/loss"} <= page.curves.keys()
    text = (tmp_path / "r.html").read_text().replace("\u00a0", " ")
    for title, figure in (("Teacher", "89.50 %"), ("Student alone,", "83.00 %"), ("Student distilled,", "86.00 %")):
        assert f"<b>{title} test top-1</b><strong>{figure}</strong>" in text


def test_resume_points_are_marked(make_run, tmp_path):
    marks = {}
    for name, resumed in (("straight", None), ("resumed", 170)):
        write_report([make_run(name, resumed=resumed)], tmp_path / f"{name}.html")
        marks[name] = (tmp_path / f"{name}.html").read_text().count("stroke: var(--ink)")
    assert marks["straight"] == 0 and marks["resumed"] >= len(SECTIONS["accuracy"])
