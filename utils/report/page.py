"""The page: a section is a function that picks what is shown and a macro of its name in sections.html that draws it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from utils.report.check import noise_check
from utils.report.curves import INFORMATION, denoisers, results, training
from utils.report.data import WORDS, Run, label, slot
from utils.report.pictures import feature_map, noise_grid, pca, rankings
from utils.report.sections import configs, cost, environment, label_free, retrieval, robustness
from utils.report.table import KINDS, Table, is_ahead, learned, make_tables, title_of
from utils.report.verdict import collapses, verdict
from utils.results import VERSION
from utils.text import count_of, duration, one_line

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
TEMPLATES.filters |= {"count_of": count_of, "duration": duration, "title_of": title_of, "slot": slot}
TEMPLATES.globals |= {
    "kinds": KINDS, "information": INFORMATION, "is_ahead": is_ahead, "label": label, "learned": learned,
    "verdict": verdict,
}  # fmt: skip


class Section(NamedTuple):
    """One heading of the page and what stands under it; without any of that it is left out."""

    id: str
    title: str
    parts: list[Markup]


def render_part(make: Callable[..., dict | None], *arguments) -> Markup:
    """One piece; where a run's files do not bear it, a note in its place, so that the others are still there."""
    macros: Any = TEMPLATES.get_template("sections.html").module
    try:
        shown = make(*arguments)
        return getattr(macros, make.__name__)(**shown) if shown else Markup()
    except Exception as error:  # what is read here may have been damaged in any way
        reason = f"{make.__name__.replace('_', ' ')} is left out: {one_line(error)}"
        print(f"warning: {reason}", file=sys.stderr)
        return macros.remark(reason)


def group_runs(tables: list[Table]) -> list[tuple[str, list[Run]]]:
    """Runs that share their axes: those of one table and objective; before them what tells their headings apart."""
    groups = []
    for table in tables:
        by_objective = table.by_objective()
        for name, runs in by_objective.items():
            words = [table.title] * (len(tables) > 1) + [name] * (len(by_objective) > 1)
            groups.append((f": {', '.join(words)}" if words else "", runs))
    return groups


def make_sections(tables: list[Table], runs: list[Run], folders: Sequence[Path]) -> list[Section]:
    """All that the page has, in its order. folders: those of denoisers."""

    def grouped(make: Callable, title: str) -> list[Section]:
        parts = [(title + more, [render_part(make, own)]) for more, own in group_runs(tables)]
        return [Section(f"{make.__name__}{i}", *one) for i, one in enumerate(parts)]

    def each(make: Callable, pattern: str) -> list[Markup]:
        return [render_part(make, label(run, runs), path) for run in runs for path in sorted(run.path.glob(pattern))]

    tops = [[render_part(make, table) for make in (results, noise_grid, pca)] for table in tables]
    rankings_of = [render_part(retrieval, runs), *each(rankings, "retrieval/*.json")]
    checks = [render_part(noise_check, folder) for folder in folders]
    found = [
        *(Section(f"results{i}", *one) for i, one in enumerate(zip([t.title for t in tables], tops, strict=True))),
        *grouped(robustness, "Robustness to other noises"),
        Section("label_free", "Figures that need no labels", [render_part(label_free, runs)]),
        Section("map", "Maps of the features", each(feature_map, "map.json")),
        Section("retrieval", "Instance recognition", rankings_of),
        *grouped(training, "Training curves"),
        Section("denoiser", "Denoiser", [render_part(denoisers, folders), *checks]),
        Section("cost", "Cost", [render_part(cost, runs)]),
        Section("environment", "Environment", [render_part(environment, runs)]),
        Section("configs", "Configurations", [render_part(configs, runs)]),
    ]
    return [section for section in found if any(section.parts)]


def page(runs: list[Run], title: str, folders: Sequence[Path] = ()) -> str:
    """The whole page as one string of HTML. folders: those of denoisers."""
    tables, runs = make_tables(runs), [run for run in runs if not run.is_floor]
    return TEMPLATES.get_template("page.html").render(
        title=title,
        runs=runs,
        seeds=sorted({run.seed for run in runs}),
        date=time.strftime("%d %B %Y"),
        banner=[WORDS["trial"]] * any(run.trial for run in runs) + collapses(runs),
        sections=make_sections(tables, runs, folders),
        version=VERSION,
    )
