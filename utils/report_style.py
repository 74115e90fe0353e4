"""The report's style sheet and pieces of markup: light and dark by the reader's setting, one column on a phone."""

from __future__ import annotations

import html

from utils.report_data import METHODS, Run

esc = html.escape
SLOTS = {method: i for i, method in enumerate(METHODS)}
_KEYS = (  # marker shapes of line_chart, drawn in the legend
    "<circle cx='10' cy='6' r='4'/>",
    "<rect x='6.5' y='2.5' width='7' height='7'/>",
    "<path d='M10 1.5l4.6 8.5h-9.2z'/>",
    "<path d='M10 1l5 5-5 5-5-5z'/>",
    "<path d='M10 10.5l4.6-8.5h-9.2z'/>",
)

CSS = """
:root { color-scheme: light dark;
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1b1f26; --muted: #5b6472; --line: #dfe3e8; --accent: #1f5fbf;
  --mark: #fff1c4; --easy: #15803d; --hard: #1d4ed8; --wrong: #b91c1c;
  --s0: #c2410c; --s1: #2563eb; --s2: #0f8a6a; --s3: #9333ea; --s4: #6b7280; --s5: #b5880b;
  --s6: #0e7490; --s7: #be185d; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171c; --panel: #1c2027; --ink: #e6e9ee; --muted: #9aa4b2; --line: #313843; --accent: #7fb0ff;
  --mark: #40371a; --easy: #4ade80; --hard: #7fa8ff; --wrong: #f87171;
  --s0: #fb923c; --s1: #6ea8fe; --s2: #34d399; --s3: #c99bff; --s4: #a3acb9; --s5: #eac54f;
  --s6: #4fc3dc; --s7: #f472b6; } }

* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 1040px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 44px; }
h1, h2, h3, p, summary { overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.015em; text-wrap: balance; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 52px 0 6px; padding-top: 18px; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 28px 0 4px; }
p { margin: 6px 0 14px; max-width: 72ch; }
.sub { color: var(--muted); }
a { color: var(--accent); text-underline-offset: 3px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 14px; font-size: 0.92rem; }

.scroll { overflow-x: auto; margin: 12px 0 8px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; min-width: 100%; }
th, td { padding: 7px 12px 7px 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--muted); font-weight: 600; font-size: 0.85rem; vertical-align: bottom; }
thead tr:last-child th, tbody tr:last-child > * { border-bottom: 1.5px solid var(--muted); }
thead th.blank { border: 0; padding: 0; }
thead th.over { text-align: center; padding-left: 22px; border-bottom: 0; padding-bottom: 0; }
tbody th { font-weight: 600; }
th small { display: block; font-weight: 400; color: var(--muted); white-space: normal; line-height: 1.35; }
.n { text-align: right; padding-left: 8px; padding-right: 6px; }
.n small { display: inline-block; width: 3.6em; margin-left: 6px; text-align: left; color: var(--muted);
  font-size: 0.8rem; font-weight: 400; }
.top { font-weight: 700; }
.learned { padding-left: 16px; }
.trained { background: var(--mark); }
th small.narrow { display: none; }
.floor > * { color: var(--muted); }
.floor > th { font-weight: 400; }
.banner, .finding { background: var(--panel); border-left: 3px solid var(--accent); padding: 12px 18px;
  margin: 16px 0; }
.banner { border-color: var(--wrong); }
.banner p, .finding p { margin: 4px 0; max-width: none; }

.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 10px 0 2px; padding: 0; list-style: none; }
.legend li { display: flex; align-items: center; gap: 7px; font-size: 0.9rem; }
.key { width: 20px; height: 12px; flex: none; }
.charts { display: grid; gap: 14px 28px; margin: 12px 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
.charts svg { width: 100%; height: auto; display: block; }

.pictures tr > * { padding: 3px 10px 3px 0; border: 0 !important; vertical-align: top; text-align: center;
  font-weight: 500; color: var(--muted); font-size: 0.85rem; }
.pictures tr > .side { padding-right: 18px; text-align: left; vertical-align: middle; white-space: normal;
  max-width: 170px; line-height: 1.35; font-weight: 600; color: var(--ink); }
.pictures img { display: block; margin: 0 auto; width: 112px; height: 112px; object-fit: contain; border-radius: 4px;
  background: var(--panel); }
.pictures img.pixel { image-rendering: pixelated; }
.db { display: block; margin-top: 2px; }

figure { margin: 0; }
.ranking { display: flex; gap: 8px; }
.ranking figure { flex: none; width: 104px; }
.ranking img { display: block; width: 104px; height: 104px; object-fit: cover; border-radius: 4px;
  border: 4px solid var(--muted); }
.ranking .easy img { border-color: var(--easy); }
.ranking .hard img { border-color: var(--hard); }
.ranking .wrong img { border-color: var(--wrong); }
.ranking .query { margin-right: 14px; }
figcaption { color: var(--muted); font-size: 0.85rem; line-height: 1.45; }
.ranking figcaption { text-align: center; }

details { border-bottom: 1px solid var(--line); padding: 8px 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--panel); padding: 14px; border-radius: 6px; font-size: 0.8rem; }
footer { color: var(--muted); font-size: 0.88rem; padding-top: 36px; padding-bottom: 56px; }

@media (max-width: 560px) {
  main, header, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 28px; }
  h1 { font-size: 1.5rem; }
  table { font-size: 0.88rem; }
  th, td { padding-right: 8px; }
  tbody th, thead th:first-child { position: sticky; left: 0; background: var(--paper); }
  tbody th { white-space: normal; min-width: 104px; }
  .n { padding-left: 6px; }
  thead th.over { padding-left: 8px; }
  .n small, .wide { display: none; }
  th small.narrow { display: block; }
  .pictures tr > .side { min-width: 84px; padding-right: 8px; }
  .pictures img { width: 92px; height: 92px; }
}
"""


def cell(text: object, kind: str = "td", css: str = "", raw: bool = False) -> str:
    """One table cell, its text escaped unless it is markup of ours."""
    return f"<{kind}{f' class={chr(34)}{css}{chr(34)}' if css else ''}>{text if raw else esc(str(text))}</{kind}>"


def table_html(head: list[list[str]], rows: list[list[str]], css: str = "", quiet: int = 0) -> str:
    """A table that scrolls sideways where the page is narrow; both `head` and `rows` are rows of finished cells.

    quiet: so many of the last rows are in the colour of remarks.
    """
    top = "".join(f"<tr>{''.join(row)}</tr>" for row in head)
    marks = [""] * (len(rows) - quiet) + [' class="floor"'] * quiet
    body = "".join(f"<tr{mark}>{''.join(row)}</tr>" for mark, row in zip(marks, rows, strict=True))
    return (
        f'<div class="scroll" tabindex="0"><table class="{css}"><thead>{top}</thead><tbody>{body}</tbody></table></div>'
    )


def heading(name: str, text: str) -> str:
    """Title of a section that the page's navigation links to."""
    return f'<h2 id="{name}">{esc(text)}</h2>'


def head_of(names: list[str], groups: list[tuple[str, list[str]]], css: str = "") -> list[list[str]]:
    """Two header rows: plain columns (`css`: class of all but the first), then figures under a title of their own."""
    over = [cell("", "th", f"blank {css}" if i else "blank") for i in range(len(names))]
    over += [f'<th class="over" colspan="{len(columns)}">{esc(title)}</th>' for title, columns in groups]
    under = [cell(name, "th", css if i else "") for i, name in enumerate(names)]
    return [over, under + [cell(column, "th", "n") for _, columns in groups for column in columns]]


def label(run: Run, runs: list[Run]) -> str:
    """The method's name, with noise, seed or folder where several of `runs` share it."""
    same = [other for other in runs if other.method == run.method]
    for text, key in ((f", {run.noise}", "noise"), (f", seed {run.seed}", "seed"), (f" ({run.path.name})", "path")):
        if len(same) > 1 and len({getattr(other, key) for other in same}) == len(same):
            return run.name + text
    return run.name if len(same) == 1 else f"{run.name} ({run.path})"


def slot(run: Run) -> int:
    """Number of the method's colour and marker."""
    return SLOTS.get(run.method, len(SLOTS))


def key(number: int, text: str) -> str:
    """An entry of a legend: the colour and marker of that number."""
    colour = f"fill:var(--s{number});stroke:var(--s{number})"
    line = f"<path d='M0 6h20' stroke-width='2'/>{_KEYS[number % len(_KEYS)]}"
    return f"<li><svg class='key' viewBox='0 0 20 12' style='{colour}' aria-hidden='true'>{line}</svg>{esc(text)}</li>"


def legend(runs: list[Run]) -> str:
    """Colours and markers of the methods among `runs`."""
    items = {run.method: key(slot(run), run.name) for run in runs}
    return f'<ul class="legend">{"".join(items.values())}</ul>'


def captioned(chart: str, note: str) -> str:
    """A chart with its line of explanation; nothing where there is no chart."""
    return f"<figure>{chart}<figcaption>{esc(note)}</figcaption></figure>" if chart else ""
