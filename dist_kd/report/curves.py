"""Runs -> curves as inline SVG: colours are the page's, text stays text, and ids never meet those of another.

Matplotlib draws with stand-in colours, which are replaced in the SVG, so that one drawing serves light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from dist_kd.report.compare import Group
from dist_kd.report.folder import RunRecord, number
from dist_kd.tracking.keys import KEYS

INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"  # stand-ins
CSS = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}
SERIES = 8  # colours of the page; a ninth group begins again with another dash
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = "osD^vPX*"
POINTS = 36_000  # of all curves of a page together; about 14 bytes each
SIZE = (4.7, 2.7)  # inches of 72 units


class Panel(NamedTuple):
    key: str
    title: str
    teacher: str = ""  # the teacher's figure drawn as a level line


SECTIONS: dict[str, tuple[Panel, ...]] = {
    "accuracy": (
        Panel("val/top1", "Validation top-1", "top1"),
        Panel("train/top1", "Training top-1"),
        Panel("val/top5", "Validation top-5", "top5"),
        Panel("train/top5", "Training top-5"),
        Panel("test/top1", "Test top-1, never chosen by", "test/top1"),
        Panel("test/loss", "Test loss, cross-entropy", "test/loss"),
        Panel("val/loss", "Validation loss, cross-entropy", "loss"),
        Panel("train/loss", "Training loss, each by its own formula"),
    ),
    "parts": (
        Panel("train/loss_ce", "Cross-entropy with the labels, before its weight"),
        Panel("train/loss_kd", "KL to the teacher x T^2, before its weight"),
    ),
    "calibration": (
        Panel("val/ece", "Expected calibration error", "ece"),
        Panel("val/agreement", "Student makes the teacher's first guess"),
    ),
    "optimization": (
        Panel("train/lr", "Learning rate"),
        Panel("train/grad_norm", "Gradient norm before clipping"),
    ),
    "speed": (
        Panel("time/images_per_s", "Training speed"),
        Panel("time/data_ms", "Waiting for data, of each step"),
    ),
}


@dataclass(frozen=True)
class Curve:
    """Points of one run; `binned` log points were averaged into each."""

    group: int
    x: tuple[float, ...]
    y: tuple[float, ...]
    binned: int
    resumes: tuple[tuple[float, float], ...]


class Plot(NamedTuple):
    key: str
    title: str
    svg: str
    binned: int  # most log points behind one point drawn


def _points(run: RunRecord, key: str, by_epoch: bool) -> list[tuple[float, float]]:
    scale = (run.epochs_per_step or 1.0) if by_epoch else 1.0
    points = []
    for line in run.of_kind("val" if key.startswith(("val/", "test/")) else "train"):
        if key in line:
            x, y = number(line.get("step")), number(line[key])
            if x is not None:
                points.append((x * scale, math.nan if y is None else y))
    return points


def _thin(points: list[tuple[float, float]], limit: int) -> tuple[list[tuple[float, float]], int]:
    """At most `limit` points, each the mean of as many neighbours as needed, and how many that is."""
    size = math.ceil(len(points) / limit)
    if size <= 1:
        return points, 1
    thinned = []
    for start in range(0, len(points), size):
        part = [(x, y) for x, y in points[start : start + size] if math.isfinite(y)]
        if part:
            thinned.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return thinned, size


def _at(points: list[tuple[float, float]], x: float) -> float | None:
    """Height of the polyline at x, or None outside it."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1 and math.isfinite(y0 + y1):
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def _curve(run: RunRecord, group: int, key: str, by_epoch: bool, limit: int) -> Curve | None:
    points, binned = _thin(_points(run, key, by_epoch), limit)
    if not any(math.isfinite(y) for _, y in points):
        return None
    scale = (run.epochs_per_step or 1.0) if by_epoch else 1.0
    resumes = [(step * scale, y) for step in run.resumes if (y := _at(points, step * scale)) is not None]
    return Curve(group, *zip(*points, strict=True), binned, tuple(resumes))


def _svg(figure, name: str) -> str:
    """The figure as an SVG element that can stand in a page beside others: own ids, page colours, page font."""
    target = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(target, format="svg", transparent=True, metadata=nothing)
    text = target.getvalue().decode()
    text = text[text.index("<svg") :].strip()
    # namespaces and the metadata block are addresses that a page has no use for; the style would hold for the page
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", text, flags=re.S)
    text = (
        re.sub(r'\s(xmlns(:xlink)?|version|width|height)="[^"]*"', "", text[: text.index(">")])
        + text[text.index(">") :]
    )
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(xlink:)?href="#([^"]+)"', rf'href="#{name}-\2"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--font)", text)
    for stand_in, variable in CSS.items():
        text = text.replace(stand_in, variable)
    text = re.sub(r"#0505([0-9a-f]{2})", lambda found: f"var(--s{int(found[1], 16)})", text)
    text = re.sub(r"#0606([0-9a-f]{2})", lambda found: f"var(--p{int(found[1], 16)})", text)
    return re.sub(r"\n\s*", "\n", text)


def series_color(group: int) -> str:
    return f"#0505{group % SERIES:02x}"


def _dash(group: int) -> Any:
    return DASHES[(group + group // SERIES) % len(DASHES)]


STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "text.color": INK,
    "path.simplify": True,
    "path.simplify_threshold": 0.2,
    "lines.solid_capstyle": "round",
}


# shares of the figure; fixed, so that plots stand in line, and several times faster than a layout that is solved for
MARGINS = {"left": 0.115, "right": 0.985, "top": 0.9, "bottom": 0.165}


def draw(name: str, paint: Callable[[Any], None], size: tuple[float, float] | None = None) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size or SIZE, layout="constrained" if size else None)
        FigureCanvasSVG(figure)
        if not size:
            figure.subplots_adjust(**MARGINS)
        paint(figure.add_subplot())
        return _svg(figure, name)


def _paint_panel(axes, panel: Panel, curves: list[Curve], level: float | None, x_label: str) -> None:
    many = len(curves) > 2 * len({curve.group for curve in curves})
    for curve in curves:
        color = series_color(curve.group)
        axes.plot(
            curve.x,
            curve.y,
            color=color,
            linestyle=_dash(curve.group),
            linewidth=1.2 if many else 1.6,
            # few points are evaluations: show each; of many, mark the last so that groups differ without colour
            marker=MARKERS[curve.group % len(MARKERS)],
            markevery=None if len(curve.x) <= 12 else [len(curve.x) - 1],
            markersize=3.4,
        )
        for x, y in curve.resumes:
            axes.plot([x], [y], marker="o", markersize=7, markerfacecolor="none", markeredgecolor=INK, zorder=4)
    if level is not None:
        axes.axhline(level, color=MUTED, linewidth=1.1, linestyle=(0, (3, 2)))
        axes.annotate(
            f"teacher {level:.4g}",
            xy=(0, level),
            xycoords=("axes fraction", "data"),
            xytext=(3, 2.5),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=8,
            color=MUTED,
            bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
        )
    unit = KEYS[panel.key].unit
    axes.set_title(panel.title + (f" ({unit})" if unit else ""), x=-0.1)
    axes.set_xlabel(x_label)
    axes.margins(x=0.02, y=0.1)


def draw_section(groups: Sequence[Group], section: str) -> list[Plot]:
    """The plots of a section that have data in any run, each with one curve a run."""
    runs = [(run, index) for index, group in enumerate(groups) for run in group.runs]
    by_epoch = all(run.epochs_per_step for run, _ in runs if run.lines)
    panels = sum(len(part) for part in SECTIONS.values())
    limit = max(24, min(300, POINTS // (panels * max(1, len(runs)))))
    plots = []
    for panel in SECTIONS[section]:
        found = [_curve(run, index, panel.key, by_epoch, limit) for run, index in runs]
        curves = [curve for curve in found if curve is not None]
        if not curves:
            continue
        levels = (
            {round(v, 6) for group in groups if (v := group.teacher(panel.teacher)) is not None}
            if panel.teacher
            else ()
        )
        level = next(iter(levels)) if len(levels) == 1 else None  # several teachers stand in the table
        name = panel.key.replace("/", "-").replace("_", "-")
        svg = draw(
            name,
            lambda axes, p=panel, c=curves, lv=level: _paint_panel(axes, p, c, lv, "epoch" if by_epoch else "step"),
        )
        plots.append(Plot(panel.key, panel.title, svg, max(curve.binned for curve in curves)))
    return plots


PARTS = (("data", "waiting for data"), ("teacher", "teacher"), ("student", "student"), ("other", "other"))


def draw_step_times(groups: Sequence[Group], parts: Sequence[dict[str, float]]) -> Plot | None:
    """Stacked bars: milliseconds of a step by part, one bar a group. `parts` goes with `groups`."""
    shown = [(group, times) for group, times in zip(groups, parts, strict=True) if any(times.values())]
    if not shown:
        return None

    def paint(axes) -> None:
        for row, (_, times) in enumerate(shown):
            left = 0.0
            whole = sum(times.values())
            for index, (part, text) in enumerate(PARTS):
                width = times.get(part, 0.0)
                if width <= 0:
                    continue
                color = f"#0606{index:02x}"  # not those of the groups
                axes.barh(row, width, left=left, height=0.56, color=color, edgecolor=PAPER, linewidth=1.2)
                if width > 0.12 * whole:
                    label = f"{text}\n{100 * width / whole:.0f} %"
                    axes.text(left + width / 2, row, label, ha="center", va="center", fontsize=7.5, color=PAPER)
                left += width
            at_end = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{whole:.1f} ms", (left, row), fontsize=8.5, color=INK, **at_end)
        axes.set_yticks(range(len(shown)), [group.label for group, _ in shown])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_title("Where a training step goes (ms)")
        axes.margins(x=0.12)

    height = 0.9 + 0.52 * len(shown)
    return Plot("time/step_ms", "Where a training step goes", draw("time-step-ms", paint, (9.6, height)), 1)


def part_swatch(part: int) -> str:
    """A square in the colour of a part of the step, for the legend of the bars."""
    return (
        '<svg class="swatch square" viewBox="0 0 10 10" aria-hidden="true">'
        f'<rect width="10" height="10" rx="2" style="fill:var(--p{part})"/></svg>'
    )


def swatch(group: int) -> str:
    """A piece of the group's line, for the legend."""
    dash = {0: "", 1: "7 3", 2: "2 2.2", 3: "8 2.5 2 2.5"}[(group + group // SERIES) % len(DASHES)]
    style = f"stroke:var(--s{group % SERIES});stroke-width:2.4;fill:none" + (
        f";stroke-dasharray:{dash}" if dash else ""
    )
    return f'<svg class="swatch" viewBox="0 0 34 10" aria-hidden="true"><path d="M1 5H33" style="{style}"/></svg>'
