"""Tables and plots -> one HTML page that asks no network for anything. Knows no files."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from dist_kd import __version__
from dist_kd.report import curves, tables
from dist_kd.report.compare import Group
from dist_kd.report.folder import RunRecord, at, number
from dist_kd.report.style import STYLE
from dist_kd.report.tables import Table

# no script, no font, no request: also if a run's name should hold markup that escaping missed
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def text_html(text: str) -> str:
    """Escaped text in which no figure is parted from its unit."""
    return escape(re.sub(r"(\d) (%|x|ms|s|min|MiB|KiB|GiB)(?!\w)", "\\1\u00a0\\2", text))


def table_html(table: Table | None, *, caption: bool = True) -> str:
    """A table whose first column heads its rows; empty text for None."""
    if table is None:
        return ""

    def cells(row: Iterable[str]) -> str:
        made = []
        for index, (column, text) in enumerate(zip(table.columns, row, strict=True)):
            tag, scope = ("th", ' scope="row"') if index == 0 else ("td", "")
            kind = ' class="num"' if column.startswith(">") else ' class="wrap"' if len(text) > 40 else ""
            made.append(f"<{tag}{scope}{kind}>{text_html(text)}</{tag}>")
        return "".join(made)

    heads = "".join(
        f'<th scope="col"{" class=num" if column.startswith(">") else ""}>{escape(column.lstrip(">"))}</th>'
        for column in table.columns
    )
    rows = "".join(
        f"<tr{' class=strong' if index in table.strong else ''}>{cells(row)}</tr>"
        for index, row in enumerate(table.rows)
    )
    title = f"<caption>{escape(table.name)}</caption>" if caption else ""
    note = f'<p class="note">{text_html(table.note)}</p>' if table.note else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{note}'


def legend_html(groups: Sequence[Group]) -> str:
    """Which line is which group, and what the ring means."""
    items = []
    for index, group in enumerate(groups):
        many = f", {len(group.runs)} runs" if len(group.runs) > 1 else ""
        items.append(f"<li>{curves.swatch(index)}<span>{escape(group.label)}{many}</span></li>")
    if any(run.resumes for group in groups for run in group.runs):
        ring = '<circle cx="17" cy="5" r="3.8" style="fill:none;stroke:var(--ink);stroke-width:1.2"/>'
        items.append(
            f'<li><svg class="swatch" viewBox="0 0 34 10" aria-hidden="true">{ring}</svg><span>resumed</span></li>'
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def plots_html(groups: Sequence[Group], section: str) -> str:
    """The plots of a section under one legend, or empty text without data."""
    plots = curves.draw_section(groups, section)
    if not plots:
        return ""
    figures = "".join(
        f'<figure role="img" aria-label="{escape(plot.title)}" data-key="{plot.key}">{plot.svg}</figure>'
        for plot in plots
    )
    binned = max(plot.binned for plot in plots)
    note = f'<p class="note">Each point is the mean of up to {binned} log points.</p>' if binned > 1 else ""
    return f'{legend_html(groups)}<div class="plots">{figures}</div>{note}'


def _card(title: str, figure: str, text: str, main: bool = False) -> str:
    return (
        f'<div class="card{" main" if main else ""}"><b>{escape(title)}</b><strong>{text_html(figure)}</strong>'
        f"<span>{text_html(text)}</span></div>"
    )


def cards_html(groups: Sequence[Group], comparisons: Sequence[dict[str, Any]]) -> str:
    """The figures to see first: teacher, student alone, student distilled, share of the gap, compression."""
    by_label = {group.label: group for group in groups}
    distilled = by_label.get(comparisons[0]["distilled"]) if comparisons else None
    distilled = distilled or next((g for g in groups if not g.is_plain), None)
    plain = by_label.get(comparisons[0]["plain"]) if comparisons else next((g for g in groups if g.is_plain), None)
    tested = bool(comparisons) and comparisons[0]["set"] == "test"
    top1 = "test top-1" if tested else "top-1"
    cards = []
    own = distilled.teacher("test/top1" if tested else "top1") if distilled is not None else None
    if own is not None:
        cards.append(_card(f"Teacher {top1}", f"{own:.2f} %", distilled.runs[0].teacher_arch))
    for title, group, main in (("Student alone", plain, False), ("Student distilled", distilled, True)):
        title = f"{title}, {top1}"
        found = (group.test("last", "top1") if tested else group.last("top1")) if group else None
        if found:
            spread = "1 run" if found.sd is None else f"\u00b1 {found.sd:.2f}, {len(found.values)} runs"
            cards.append(_card(title, f"{found.mean:.2f} %", spread, main))
    if comparisons:
        closed, points = comparisons[0]["gap_closed_percent"], comparisons[0]["points"]
        shown = "undefined" if closed is None else f"{closed:.0f} %"
        cards.append(_card("Gap to the teacher closed", shown, f"{points:+.2f} points of top-1"))
    for run in distilled.runs if distilled else ():
        teacher, student = (number(at(run.compression, side, "parameters")) for side in ("teacher", "student"))
        if teacher and student:
            text = f"{tables.scaled(teacher, '')} to {tables.scaled(student, '')}"
            cards.append(_card("Fewer parameters", f"{teacher / student:.1f} x", text))
            break
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _results(groups: Sequence[Group], comparisons: Sequence[dict[str, Any]]) -> str:
    parts = [table_html(tables.headline(groups), caption=False)]
    for found in comparisons:
        other = ", ".join(found["differs_also_in"])
        caution = f" The two differ also in: {other}." if other else ""
        which = f"{found['distilled']}: " if len(comparisons) > 1 else ""
        parts.append(f'<p class="verdict {found["verdict"]}">{text_html(which + found["sentence"] + caution)}</p>')
    if not comparisons:
        parts.append(
            '<p class="note">The share of the gap closed is undefined: it takes a distilled run and a run of the same '
            "student from labels only (--no-kd), each with an evaluation.</p>"
        )
    return "".join(parts)


def _compression(groups: Sequence[Group]) -> str:
    return "".join(table_html(table) for table in tables.compression(groups))


def _calibration(groups: Sequence[Group]) -> str:
    return table_html(tables.calibration(groups), caption=False) + plots_html(groups, "calibration")


def _speed(groups: Sequence[Group]) -> str:
    times_of = [
        {name: times.get(f"{name}_ms", 0.0) for name, _ in curves.PARTS}
        for times in (tables.mean_timing(group) for group in groups)
    ]
    bars = curves.draw_step_times(groups, times_of)
    figure = ""
    if bars:
        parts = enumerate(text for _, text in curves.PARTS)
        legend = "".join(f"<li>{curves.part_swatch(i)}<span>{text}</span></li>" for i, text in parts)
        figure = (
            f'<figure class="wide" role="img" aria-label="{bars.title}" data-key="{bars.key}">{bars.svg}'
            f'<ul class="legend">{legend}</ul></figure>'
        )
    return table_html(tables.speed(groups), caption=False) + figure + plots_html(groups, "speed")


def _configuration(groups: Sequence[Group]) -> str:
    differ, same = tables.settings(groups)
    formulas = dict.fromkeys(str(f) for g in groups for run in g.runs if (f := run.summary.get("formula")))
    loss = "".join(f"<p>Loss in force: <code>{escape(formula)}</code></p>" for formula in formulas)
    alike = ""
    if same:
        half = (len(same.rows) + 1) // 2
        halves = (replace(same, rows=rows) for rows in (same.rows[:half], same.rows[half:]) if rows)
        beside = "".join(f"<div>{table_html(table, caption=False)}</div>" for table in halves)
        alike = f'<h3>{escape(same.name)}</h3><div class="columns">{beside}</div>'
    return loss + table_html(differ) + alike


def sections(groups: Sequence[Group], comparisons: Sequence[dict[str, Any]]) -> list[tuple[str, Callable[[], str]]]:
    """The page's sections in reading order: title, and what makes its content. Empty content leaves a section out."""
    return [
        ("Results", lambda: _results(groups, comparisons)),
        ("Accuracy and loss", lambda: plots_html(groups, "accuracy")),
        ("Loss parts", lambda: plots_html(groups, "parts")),
        ("Calibration and agreement", lambda: _calibration(groups)),
        ("Compression", lambda: _compression(groups)),
        ("Speed and waits", lambda: _speed(groups)),
        ("Optimization", lambda: plots_html(groups, "optimization")),
        ("What was skipped", lambda: table_html(tables.skipped(groups), caption=False)),
        ("Data", lambda: table_html(tables.data(groups), caption=False)),
        ("Configuration", lambda: _configuration(groups)),
        ("Runs", lambda: table_html(tables.runs(groups), caption=False) + table_html(tables.versions(groups))),
    ]


def render(
    runs: Sequence[RunRecord], groups: Sequence[Group], comparisons: Sequence[dict[str, Any]], problems: list[str]
) -> str:
    """The page. A section that cannot be made is left out and told in `problems`, which is on the page too."""
    made = []
    for title, content in sections(groups, comparisons):
        try:
            html = content()
        except Exception as error:  # a report on odd input says what it could not show; it does not end the program
            problems.append(f"the section `{title}` could not be made ({type(error).__name__}: {error})")
            continue
        if html:
            anchor = title.lower().replace(" ", "-")
            made.append(f'<section id="{anchor}"><h2>{escape(title)}</h2>{html}</section>')
    try:
        cards = cards_html(groups, comparisons)
    except Exception as error:
        cards = ""
        problems.append(f"the summary could not be made ({type(error).__name__}: {error})")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    told = [f"{run.name}: {text}" for run in runs for text in run.missing] + problems
    warnings = "".join(f"<li>{escape(text)}</li>" for text in told[:40])
    if len(told) > 40:
        warnings += f"<li>and {len(told) - 40} more</li>"
    states = ", ".join(f"{n} {state}" for state, n in Counter(run.state for run in runs).items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>Distillation report: {escape(title)}</title>'
        f"<style>{STYLE}</style></head>"
        f"<body><main><header><h1>Distillation report: {escape(title)}</h1><p>{escape(states)}</p></header>{cards}"
        f"{f'<ul class=warnings>{warnings}</ul>' if warnings else ''}{''.join(made)}"
        f"<footer>Made by dist_kd {__version__} on {time.strftime('%Y-%m-%d %H:%M')} from the files of the run "
        "folders.</footer></main></body></html>\n"
    )
