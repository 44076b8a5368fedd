"""A study's table and plot -> one HTML page that asks no network for anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from dist_kd import __version__
from dist_kd.report.compare import Spread
from dist_kd.report.curves import INK, MUTED, draw, series_color
from dist_kd.report.page import POLICY, table_html, text_html
from dist_kd.report.style import STYLE
from dist_kd.report.sweep_table import Arm, Results
from dist_kd.report.tables import Table

SIZE = (6.6, 3.7)  # inches of 72 units; text is then about 12 px high on a page 700 px wide
LOG_FROM = 20  # largest value / smallest, from which the axis is logarithmic
APART = 0.035  # least distance of two tick labels, as a share of the axis


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def positions(arms: Sequence[Arm]) -> tuple[list[float], str]:
    """Where each arm stands on the x axis, and whether that is a `linear`, `log` or `category` scale."""
    values = [arm.value for arm in arms]
    if not all(map(is_number, values)):
        return [float(k) for k in range(len(arms))], "category"
    log = min(values) > 0 and max(values) / min(values) > LOG_FROM
    return [float(value) for value in values], "log" if log else "linear"


def _ticks(places: Sequence[float], labels: Sequence[str], scale: str) -> tuple[list[float], list[str]]:
    """A tick at each value that was tried, but for numbers whose labels would run into the one before."""
    if scale == "category":
        return list(places), list(labels)
    along = [math.log(x) for x in places] if scale == "log" else list(places)
    least = APART * ((max(along) - min(along)) or 1)
    kept: list[int] = []
    for k in sorted(range(len(along)), key=lambda k: along[k]):
        if not kept or along[k] - along[kept[-1]] >= least * max(1, len(labels[k]) / 3):
            kept.append(k)
    return [places[k] for k in kept], [labels[k] for k in kept]


def _paint(axes, results: Results) -> None:
    from matplotlib.transforms import ScaledTranslation

    places, scale = positions(results.arms)
    if scale == "log":
        axes.set_xscale("log")
    place_of = dict(zip([arm.twin for arm in results.arms], places, strict=True))
    shared = len(results.twins) == 1

    def series(arms: Sequence[Arm], at: Sequence[float], color: str, marker: str, label: str) -> None:
        """Mean and sd of each arm; beside it a dot for each seed, all seeds in the same order."""
        for k, (arm, x) in enumerate(zip(arms, at, strict=True)):
            found = Spread.of(list(arm.top1.values()))
            if found is None:
                continue
            axes.errorbar(
                [x], [found.mean], yerr=[found.sd or 0.0], color=color, marker=marker, markersize=6, capsize=4,
                linewidth=1.5, label=label if k == 0 else None, zorder=3,
            )  # fmt: skip
            for n, seed in enumerate(arm.runs):
                if seed in arm.top1:
                    beside = ScaledTranslation(
                        (8 + 12 * n / max(3, len(arm.runs))) / 72, 0, axes.figure.dpi_scale_trans
                    )
                    axes.plot(
                        [x], [arm.top1[seed]], marker=".", markersize=5, color=color, alpha=0.65, linestyle="none",
                        transform=axes.transData + beside, zorder=2,
                    )  # fmt: skip

    if shared:
        found = Spread.of(list(results.twins[0].top1.values()))
        if found:
            low, high = found.mean - (found.sd or 0), found.mean + (found.sd or 0)
            axes.axhspan(low, high, color=MUTED, alpha=0.14, linewidth=0)
            axes.axhline(found.mean, color=MUTED, linewidth=1.2, linestyle=(0, (3, 2)), label="without teacher")
    else:
        twins = [twin for twin in results.twins if twin.label in place_of]
        series(twins, [place_of[t.label] for t in twins], MUTED, "s", "without teacher")
    series(results.arms, places, series_color(0), "o", "with teacher" if results.twins else "")

    ticks, labels = _ticks(places, [arm.label for arm in results.arms], scale)
    turned = scale == "category" and sum(len(label) + 3 for label in labels) > 80
    axes.set_xticks(ticks, labels, rotation=25 if turned else 0, ha="right" if turned else "center")
    axes.minorticks_off()
    axes.grid(False, axis="x")
    if scale == "category":
        axes.set_xlim(-0.5, len(places) - 0.5)
    else:
        axes.margins(x=0.07)
    axes.set_xlabel(results.name + (", logarithmic" if scale == "log" else ""))
    axes.set_ylabel("top-1 (%)")
    axes.set_title("Validation top-1 of the last epoch", color=INK)
    if results.twins:
        axes.legend(frameon=False, fontsize=8.5, loc="best", labelcolor=INK)


def plot(results: Results) -> str:
    """The study as an inline SVG, or empty text before the first run is done."""
    if not any(arm.top1 for arm in results.arms):
        return ""
    return draw("sweep", lambda axes: _paint(axes, results), SIZE)


def render(results: Results, table: Table) -> str:
    """The page. It is a pure function of its arguments."""
    svg = plot(results)
    twin = "; the band is that of the plain twin" if len(results.twins) == 1 else ""
    caption = f"Mean and standard deviation over seeds{twin}. Small dots: the seeds, from left to right."
    figure = (
        f'<figure style="max-width:760px;margin:0" role="img" aria-label="{escape(table.name)}">{svg}'
        f"<figcaption>{text_html(caption)}</figcaption></figure>"
        if svg
        else '<p class="note">No run is done yet.</p>'
    )
    missing = [f"{arm.label}: seed {', '.join(map(str, arm.missing))}" for arm in results.rows if arm.missing]
    told = f"<ul class=warnings><li>{escape('not done: ' + '; '.join(missing))}</li></ul>" if missing else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(table.name)}</title><style>{STYLE}</style></head>'
        f"<body><main><header><h1>{escape(table.name)}</h1><p><code>{escape(results.command)}</code></p></header>{told}"
        f"<section>{figure}</section><section>{table_html(table, caption=False)}</section>"
        f"<footer>Made by dist_kd {__version__} from the files of the run folders.</footer></main></body></html>\n"
    )
