"""What a table's figures say, in sentences: collapse, floors, the paper's ordering, and how far they can be trusted."""

from __future__ import annotations

from itertools import pairwise

from utils.report.data import FLOORS, METHODS, WORDS, Run
from utils.report.table import NEEDED, Cell, Line, Table, title_of
from utils.significance import difference
from utils.text import count_of

EQUAL_ALLOWED = {"n2n", "clean"}  # NCT <= N2N + DINOv2 <= clean; up to NCT each is strictly above the one before


def verdict(table: Table) -> list[str]:
    """All sentences on one table, the gravest first."""
    compared = orderings(table) + summary(table)
    sentences = ([WORDS["trial"]] if table.trial else []) + collapses(table.runs) + repeated(table)
    sentences += compared + kept_out(table)
    return sentences + caveats(table) if compared else sentences


def collapses(runs: list[Run]) -> list[str]:
    """A sentence for each run whose training ended, or stands, in a collapse."""
    said = []
    for run in runs:
        if found := run.collapse():
            what = WORDS["collapses"].get(found[0], found[0])
            said.append(f"Collapsed: {run.name}, seed {run.seed}, {what}; since epoch {found[1]:g}.")
    return said


def repeated(table: Table) -> list[str]:
    """A sentence for each line that averages several runs of one seed, which must differ in something else."""
    return [
        f"{line.name} is the mean of {count_of(len(line.runs), 'run')} of {count_of(line.seeds, 'seed')}: its ± is not "
        "that of seeds alone; report runs of other settings by themselves."
        for line in table.lines
        if len(line.runs) > line.seeds
    ]


def summary(table: Table) -> list[str]:
    """Each method against the floors of its own view, in plain words."""
    return [
        f"{title_of(metric)}: {against_floors(line, metric)}."
        for metric in table.metrics
        for line in table.lines
        if line.final(metric) and any(floor.final(metric) for floor in line.floors)
    ]


def against_floors(line: Line, metric: str) -> str:
    """ "DINOv2 w/ NC: 61.2, 40.1 above an untrained backbone, 5.2 below the raw pixels"."""
    final, parts = line.final(metric), []
    for floor in line.floors:
        if under := floor.final(metric):
            gap = difference(final.rows, under.rows)
            where = "above" if gap.points >= 0 else "below"
            name = FLOORS[floor.method]["short"]
            untold = "" if gap.sign else f" (cannot be told apart: {gap.known})"
            parts.append(f"{abs(gap.points):.1f} {where} {name}{untold}")
    return f"{line.name}: {final.mean:.1f}, {', '.join(parts)}"


def orderings(table: Table) -> list[str]:
    """A sentence for each metric and objective on the paper's ordering, DINOv2 < NC < NCT <= N2N + DINOv2 <= clean."""
    sentences = []
    for metric in table.metrics:
        for objective in table.by_objective():
            lines = [line for line in table.lines if line.objective == objective and line.method in METHODS]
            finals = {line.method: final for line in lines if (final := line.final(metric))}
            if len(finals) > 1:
                sentences.append(f"{title_of(metric)}: {ordering(finals, objective)}")
    return sentences


def ordering(finals: dict[str, Cell], objective: str = "DINOv2") -> str:
    """One sentence on the final figures of methods in the paper's order: whether each is above the one before it."""
    names = {method: METHODS[method]["short"].replace("DINOv2", objective) for method in finals}
    expected, shown, wrong, unclear = names[next(iter(finals))], [], [], []
    for low, high in pairwise(finals):
        expected += f" {'≤' if high in EQUAL_ALLOWED and low != 'dinov2' else '<'} {names[high]}"
        gap = difference(finals[high].rows, finals[low].rows)
        if gap.sign > 0:
            shown.append(f"{names[high]} is above {names[low]} ({gap})")
        elif gap.sign < 0:
            wrong.append(f"{names[high]} is below {names[low]} ({gap})")
        else:
            unclear.append(f"{names[low]} and {names[high]} cannot be told apart ({gap})")
    state = "does not show" if wrong else "is not settled" if unclear else "shows"
    return f"the paper's ordering, {expected}, {state}: {'; '.join(wrong + unclear + shown)}."


def kept_out(table: Table) -> list[str]:
    """Sentences on the floors that were left out, and on those that are missing."""
    sentences = list(table.kept_out)
    lacking = [line.name for line in table.lines if line.cells and not {f.method for f in line.floors} >= set(NEEDED)]
    if lacking:
        sentences.append(f"Both floors are needed to say whether this learned, and are lacking: {', '.join(lacking)}.")
    return sentences


def caveats(table: Table) -> list[str]:
    """Sentences on the figures that the others rest on, and on how well they are known."""
    present = {line.runs[0].name for line in table.lines}
    wanted = [words["name"] for method, words in METHODS.items() if (method, table.noise) != ("clean", "none")]
    possible = [name.replace("DINOv2", objective) for objective in table.by_objective() for name in wanted]
    impossible = [METHODS["nct"]["name"].replace("DINOv2", objective) for objective in WORDS["without_nct"]]
    missing = [name for name in possible if name not in (*present, *impossible)]
    sentences = [f"Not among these runs: {', '.join(missing)}."] if missing else []
    finals = [[c for line in table.lines + table.floors if (c := line.final(m))] for m in table.metrics]
    kinds = {difference(a.rows, b.rows).over for cells in finals for a, b in pairwise(cells)}
    errors = " or ".join(text for kind, text in WORDS["errors"].items() if kind in kinds)
    sentences.append(
        "All of this rests on the final checkpoints (the best ones were chosen on the validation images themselves), "
        f"and takes more than two standard errors for a difference{f'; errors {errors}' if errors else ''}."
    )
    if all(line.seeds == 1 for line in table.lines):
        sentences.append("One seed each: the spread between seeds is not known.")
    if table.val_images:
        margin = 100 * 1.96 * (0.25 / table.val_images) ** 0.5
        sentences.append(
            f"With {count_of(table.val_images, 'validation image')} a figure near 50\u00a0% is known to about "
            f"±{margin:.1f} points (95\u00a0%)."
        )
    return sentences
