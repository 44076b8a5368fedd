"""The report's style sheet: light and dark by the reader's preference, readable without colour and on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "DejaVu Sans", Arial, sans-serif;
  --paper: #ffffff; --back: #f4f5f7; --ink: #1b1f27; --muted: #59616f; --grid: #e3e6eb; --line: #d5d9e0;
  --accent: #1d4fd8; --tint: #edf2fe; --good: #0b6b3a; --bad: #a3161c; --warn: #7a4b00; --warn-back: #fff6e0;
  --s0: #1f5fd6; --s1: #c2540a; --s2: #11804d; --s3: #b3256f; --s4: #6b3fd1; --s5: #0b7a8f; --s6: #6d6a00;
    --s7: #c0272d;
  --p0: #b3362c; --p1: #56657e; --p2: #0b6f86; --p3: #767f8d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161a22; --back: #0e1117; --ink: #e8ebf1; --muted: #a2abba; --grid: #2a303c; --line: #333a47;
    --accent: #8db2ff; --tint: #1b2538; --good: #6fd6a0; --bad: #ff9a9a; --warn: #ffd480; --warn-back: #2c2410;
    --s0: #7aa7ff; --s1: #ffa45c; --s2: #5fd39a; --s3: #ff8ac2; --s4: #b79bff; --s5: #5fd0e3; --s6: #d7d05a;
    --s7: #ff8a8a;
    --p0: #ff9d8f; --p1: #a9b8d2; --p2: #63cbe0; --p3: #8d96a5;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 var(--font); }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
header h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
header p { margin: 0; color: var(--muted); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px;
  margin: 18px 0 0; }
h2 { font-size: 18px; margin: 0 0 10px; letter-spacing: -0.005em; }
h3 { font-size: 14px; margin: 18px 0 6px; }
p.note, figcaption { color: var(--muted); font-size: 13px; margin: 8px 0 0; max-width: 88ch; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 18px 0 0; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 13px; font-weight: 600; color: var(--muted); }
.card strong { display: block; font-size: 27px; line-height: 1.25; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--muted); font-size: 13px; }
.card.main { border-color: var(--accent); background: var(--tint); }
p.verdict { margin: 14px 0 0; padding: 10px 14px; border-left: 4px solid var(--muted);
  background: var(--back); max-width: none; }
p.verdict.helped { border-color: var(--good); } p.verdict.hurt { border-color: var(--bad); }
ul.warnings { margin: 18px 0 0; padding: 12px 16px 12px 34px; background: var(--warn-back); color: var(--warn);
  border: 1px solid var(--line); border-radius: 10px; font-size: 14px; }
.scroll { overflow-x: auto; } p.note + .scroll { margin-top: 16px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; font-size: 14px; padding: 4px 0 6px; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { font-weight: 600; font-size: 13px; color: var(--muted); border-bottom: 1.5px solid var(--line);
  white-space: nowrap; }
tbody th { color: var(--ink); font-size: 14px; font-weight: 500; border-bottom: 1px solid var(--grid);
  white-space: normal; }
.num { text-align: right; white-space: nowrap; padding-right: 0; padding-left: 14px; }
td.num + td:not(.num), th.num + th:not(.num) { padding-left: 28px; }
tr.strong th, tr.strong td { font-weight: 700; background: var(--tint); }
tr:last-child > * { border-bottom: none; }
td.wrap { overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 40px; }
.columns th, .columns td { padding-top: 3px; padding-bottom: 3px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 14px 0 10px; padding: 0; list-style: none;
  font-size: 13.5px; }
.legend li { display: flex; align-items: center; gap: 8px; }
.swatch { width: 34px; height: 10px; flex: none; } .swatch.square { width: 11px; }
figure.wide { margin: 18px 0 0; } figure.wide .legend { margin: 4px 0 0; }
th:first-child, td:first-child { padding-left: 8px; } th:last-child, td:last-child { padding-right: 8px; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 18px 26px; }
.plots figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: var(--font); }
code { font: 13px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
footer { color: var(--muted); font-size: 13px; margin: 18px 2px 0; }
@media (max-width: 760px) { .plots { grid-template-columns: 1fr; } .columns { grid-template-columns: 1fr; }
  main { padding: 18px 12px; } }
@media print {
  :root { --paper: #fff; --back: #fff; --ink: #000; --muted: #444; --grid: #ddd; --line: #bbb; --tint: #f2f2f2;
    --s0: #1f5fd6; --s1: #c2540a; --s2: #11804d; --s3: #b3256f; --s4: #6b3fd1; --s5: #0b7a8f; --s6: #6d6a00;
    --s7: #c0272d;
    --p0: #b3362c; --p1: #56657e; --p2: #0b6f86; --p3: #767f8d;
    --accent: #1d4fd8; --warn: #4a2d00; --warn-back: #fff; color-scheme: light; }
  body { font-size: 11px; } main { max-width: none; padding: 0; }
  section { border: none; padding: 6px 0; } table { font-size: 10.5px; }
  figure, tr, .card, .verdict { break-inside: avoid; } h2, caption { break-after: avoid; }
  .scroll { overflow: visible; } .card strong { font-size: 20px; }
}
"""
