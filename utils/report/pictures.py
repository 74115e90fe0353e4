"""Pictures of the report: what the models see, the components of their patch tokens, rankings, and maps."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.images import (
    MAX_PIXELS,
    denoised_root,
    grey_levels,
    list_images,
    read_image,
    read_manifest,
    twin,
    visible,
)
from utils.noise import NoiseSpec, keyed_noise, noise_key
from utils.report.data import Run, label
from utils.report.plots import SERIES, data_uri, scatter
from utils.report.table import Table
from utils.text import one_line
from utils.values import Values, rule_for_reading

GRID_IMAGES = 4
THUMBNAIL = 112  # pixels, as shown
MAP = 1600  # pixels of a map at most
LABELLED = "A point is an image, a colour a label, which the map knows nothing of. Good: colours lie together."


class Picture(NamedTuple):
    """An image of a table, and the decibels under it."""

    uri: str
    decibel: float | None
    small: bool  # smaller than it is shown: its pixels stay sharp


def make_picture(image: np.ndarray | None, decibel: float | None = None, side: int = 2 * THUMBNAIL) -> Picture | None:
    """The picture of an image [H, W, C], as visible() shows it; None for None, which leaves its place empty."""
    if image is None:
        return None
    return Picture(data_uri(visible(image), side), decibel, max(image.shape[:2]) < THUMBNAIL)


def noise_grid(table: Table) -> dict:
    """Clean, noisy and denoised views of a few validation images; what is wrong when the images are not at hand."""
    spec = NoiseSpec.parse(table.noise)
    try:
        columns = list(grid_views(table.runs[0], spec))
    except (ValueError, OSError) as error:
        return {"rows": [], "measured": False, "problem": str(error)}
    names = ["noisy by nature", "", "denoised"] if spec.kind == "none" else ["clean", str(spec), "denoised"]
    measured, rows = spec.kind != "none", []
    for i, name in enumerate(names):
        if any(column[i] is not None for column in columns):
            known = [psnr(column[i], column[0]) if i and measured else None for column in columns]
            pictures = [make_picture(column[i], figure) for column, figure in zip(columns, known, strict=True)]
            rows.append((name, pictures))
    return {"rows": rows, "measured": measured, "problem": ""}


def grid_views(run: Run, spec: NoiseSpec) -> Iterator[list[np.ndarray | None]]:
    """read_views() of a few images, spread evenly over the validation set."""
    data = run.config.get("data") or {}
    root, channels = Path(str(data.get("root") or "")), int(data.get("in_chans", 3))
    seed, limit = int(data.get("noise_seed", 0)), int(data.get("max_pixels", MAX_PIXELS))
    values = rule_for_reading(Values.parse(data.get("values", "full")), root)
    denoised = Path(data.get("denoised_root") or denoised_root(root, spec))
    suffix = "." + (read_manifest(denoised) or {}).get("format", "png")
    within = "val/" if (root / "val").is_dir() else ""
    relatives = list_images(root / within, data.get("stack", "refuse"))
    for i in np.unique(np.linspace(0, len(relatives) - 1, GRID_IMAGES + 2).astype(int)[1:-1]):
        name = within + relatives[i]
        yield read_views(root, name, spec, seed, channels, values, twin(denoised, name, suffix), limit)


def read_views(
    root: Path, relative: str, spec: NoiseSpec, seed: int, channels: int, values: Values, denoised: Path,
    max_pixels: int = MAX_PIXELS,
) -> list[np.ndarray | None]:  # fmt: skip
    """An image as its file holds it, with noise, and denoised; None for a view that there is not.

    denoised: the file of the denoised image, which need not exist.
    """
    source = read_image(root / relative, channels, "native", values, max_pixels)
    noisy = None if spec.kind == "none" else keyed_noise(source, spec, seed, noise_key(relative))
    there = denoised.is_file()
    return [source, noisy, read_image(denoised, channels, "native", max_pixels=max_pixels) if there else None]


def psnr(image: np.ndarray | None, reference: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio in dB; None for no image and for an equal one."""
    if image is None:
        return None
    error = np.mean((grey_levels(image).astype(np.float64) - grey_levels(reference).astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error > 0 else None


def pca(table: Table) -> dict | None:
    """First three principal components of patch tokens as colours: a table of the runs that show the same images."""
    groups: dict[tuple, list[tuple[Run, dict]]] = {}
    damaged = []
    for run in table.runs:
        if (run.path / "pca.npz").is_file():
            try:
                with np.load(run.path / "pca.npz", allow_pickle=False) as file:
                    content = {key: file[key] for key in ("names", "views", "images", "components")}
            except Exception as error:  # a damaged archive fails in many ways
                damaged.append(f"{run.path / 'pca.npz'} cannot be read: {one_line(error)}")
                print(f"warning: {damaged[-1]}", file=sys.stderr)
                continue
            groups.setdefault(tuple(content["names"].tolist()), []).append((run, content))
    tables = [pca_table(members) for members in groups.values()]
    return {"tables": tables, "damaged": damaged} if tables or damaged else None


def pca_table(members: list[tuple[Run, dict]]) -> tuple[list[str], list[tuple[str, str, list[Picture | None]]]]:
    """Heads of the columns, "clean" where there is such a view, and rows: pictures on top, below them the components, a
    row for each run and each view besides the clean one.
    """
    count, runs = len(members[0][1]["names"]), [run for run, _ in members]
    clean = ["clean"] * any("clean" in content["views"] for _, content in members)
    inputs = [(run, content, view) for run, content in members for view in content["views"].tolist() if view != "clean"]
    inputs += [(run, content, "clean only") for run, content in members if content["views"].tolist() == ["clean"]]

    def row(title: str, content: dict, view: str, kind: str) -> tuple[str, str, list[Picture | None]]:
        at = {name: v for v, name in enumerate(content["views"].tolist())}
        shown = [content[kind][i, at[v]] if v in at else None for i in range(count) for v in (*clean, view)]
        return title, view, [make_picture(one, side=THUMBNAIL) for one in shown]

    pictures = {view: content for _, content, view in inputs}
    rows = [row("image", content, view, "images") for view, content in pictures.items() if view != "clean only"]
    rows += [row(label(run, runs), content, view, "components") for run, content, view in inputs]
    return [*clean, "input"] * count, rows


def rankings(name: str, path: Path) -> dict:
    """Strips of a retrieval/<set>.json of the run of that name: the query, then what was found: (kind, name, image)."""
    content = json.loads(path.read_text())
    strips = [
        [
            (entry["kind"], entry["name"], data_uri(read_image(twin(path.parent, entry["picture"])), THUMBNAIL))
            for entry in [ranking["query"], *ranking["found"]]
        ]
        for ranking in content["rankings"]
    ]
    return {"name": name, "dataset": content["dataset"], "strips": strips}


def feature_map(name: str, path: Path) -> dict:
    """A map.json of the run of that name: map.png beside it as it is, and the points where they say more than it."""
    content, drawn = json.loads(path.read_text()), path.with_name("map.png")
    points = [(x, y, str(label or "")) for x, y, _, label in content["points"]]
    uri = data_uri(read_image(drawn), MAP) if drawn.is_file() else ""
    told = 1 < len({label for _, _, label in points}) <= len(SERIES)
    charts = [scatter(points, LABELLED if told else "A point is an image.")] if told or not uri else []
    figures = {"method": content["method"], "explained": content.get("explained") or [], "count": len(points)}
    return {"name": name, "figures": figures, "uri": uri, "charts": charts}
