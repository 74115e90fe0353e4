"""Pictures of the report: what the models see, the components of their patch tokens, and rankings of landmarks."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np

from utils.images import denoised_root, grey_levels, list_images, read_image, read_manifest, twin, visible
from utils.noise import NoiseSpec, keyed_noise, noise_key
from utils.report_data import Run
from utils.report_plots import data_uri, psnr
from utils.report_style import cell, esc, label, table_html
from utils.report_table import Table
from utils.values import Values, reading

GRID_IMAGES = 4
THUMBNAIL = 112  # pixels, as shown


def picture(image: np.ndarray | None, decibel: float | None = None, side: int = 2 * THUMBNAIL) -> str:
    """A table cell with an image [H, W, C], as visible() shows it, and its PSNR; None leaves it empty."""
    if image is None:
        return cell("")
    pixel = ' class="pixel"' if max(image.shape[:2]) < THUMBNAIL else ""
    below = f'<span class="db">{decibel:.1f} dB</span>' if decibel is not None and math.isfinite(decibel) else ""
    return cell(f'<img{pixel} alt="" src="{data_uri(visible(image), side)}">{below}', raw=True)


def noise_grid(table: Table) -> str:
    """Clean, noisy and denoised views of a few validation images; a note when the images are not at hand."""
    data, spec = table.runs[0].config.get("data") or {}, NoiseSpec.parse(table.noise)
    root, channels = Path(str(data.get("root") or "")), int(data.get("in_chans", 3))
    values = reading(Values.parse(data.get("values", "full")), root)
    denoised = Path(data.get("denoised_root") or denoised_root(root, spec))
    try:
        suffix = "." + (read_manifest(denoised) or {}).get("format", "png")
        within = "val/" if (root / "val").is_dir() else ""
        relatives = list_images(root / within, data.get("stack", "refuse"))
        chosen = np.unique(np.linspace(0, len(relatives) - 1, GRID_IMAGES + 2).astype(int)[1:-1])
        columns = [
            _views(root, name, spec, int(data.get("noise_seed", 0)), channels, values, twin(denoised, name, suffix))
            for name in (f"{within}{relatives[i]}" for i in chosen)
        ]
    except (ValueError, OSError) as error:
        return f'<p class="sub">No pictures of the data: {esc(str(error))}.</p>'
    names = ["noisy by nature", None, "denoised"] if spec.kind == "none" else ["clean", str(spec), "denoised"]
    rows = []
    for i, name in enumerate(names):
        if any(column[i] is not None for column in columns):
            known = [i and spec.kind != "none" and column[i] is not None for column in columns]
            figures = [
                psnr(grey_levels(column[i]), grey_levels(column[0])) if there else None
                for column, there in zip(columns, known, strict=True)
            ]
            row = [picture(column[i], figure) for column, figure in zip(columns, figures, strict=True)]
            rows.append([cell(name, "th", "side"), *row])
    note = "PSNR against the clean image under each. Only the clean ceiling is trained on clean images."
    note = "" if spec.kind == "none" else f'<p class="sub">{note}</p>'
    return f"<h3>What the models see</h3>{table_html([], rows, 'pictures')}{note}"


def _views(
    root: Path, relative: str, spec: NoiseSpec, seed: int, channels: int, values: Values, denoised: Path
) -> list[np.ndarray | None]:
    """[the file, with noise, denoised]: None for what there is not. denoised: the file of that."""
    source = read_image(root / relative, channels, "native", values)
    noisy = None if spec.kind == "none" else keyed_noise(source, spec, seed, noise_key(relative))
    return [source, noisy, read_image(denoised, channels, "native") if denoised.is_file() else None]


def pca_section(table: Table) -> str:
    """First three principal components of patch tokens as colours, for the runs that have them."""
    groups: dict[tuple, list[tuple[Run, dict]]] = {}  # by the images shown
    damaged = []
    for run in table.runs:
        if (run.path / "pca.npz").is_file():
            try:
                with np.load(run.path / "pca.npz", allow_pickle=False) as file:
                    content = {key: file[key] for key in ("names", "views", "images", "components")}
            except Exception as error:  # a damaged archive fails in many ways
                damaged.append(f"{run.path / 'pca.npz'} cannot be read: {' '.join(str(error).split())}")
                print(f"warning: {damaged[-1]}", file=sys.stderr)
                continue
            groups.setdefault(tuple(content["names"].tolist()), []).append((run, content))
    notes = "".join(f'<p class="sub">{esc(one)}</p>' for one in damaged)
    if not groups:
        return notes
    note = (
        "Patch tokens of the last block; their first three principal components, fitted for each image over all of its "
        "views together, as red, green and blue. The closer the colours of the noisy image are to those of the clean "
        "one, the less the features care about the noise."
    )
    tables = "".join(_pca_table(members) for members in groups.values())
    return f'<h3>Patch features, clean and noisy</h3><p class="sub">{note}</p>{tables}{notes}'


def _pca_table(members: list[tuple[Run, dict]]) -> str:
    """Pictures on top, below them the components: a row for each run and each view besides the clean one."""
    count, runs = len(members[0][1]["names"]), [run for run, _ in members]
    inputs = [(run, content, view) for run, content in members for view in content["views"].tolist() if view != "clean"]
    inputs += [(run, content, "clean only") for run, content in members if content["views"].tolist() == ["clean"]]

    def line(title: str, content: dict, view: str, kind: str) -> list[str]:
        at = {name: v for v, name in enumerate(content["views"].tolist())}
        shown = [content[kind][i, at[v]] if v in at else None for i in range(count) for v in ("clean", view)]
        name = cell(f"{esc(title)}<small>input: {esc(view)}</small>", "th", "side", raw=True)
        return [name, *[picture(one, side=THUMBNAIL) for one in shown]]

    pictures = {view: content for _, content, view in inputs}
    rows = [line("image", content, view, "images") for view, content in pictures.items() if view != "clean only"]
    rows += [line(label(run, runs), content, view, "components") for run, content, view in inputs]
    head = [cell("", "th"), *[cell(text, "th") for _ in range(count) for text in ("clean", "input")]]
    return table_html([head], rows, "pictures")


def rankings(name: str, path: Path) -> str:
    """Strips of pictures of one run's retrieval/<set>.json: the query, then what was found, framed by its kind."""
    content = json.loads(path.read_text())
    strips = []
    for ranking in content["rankings"]:
        figures = []
        for entry in [ranking["query"], *ranking["found"]]:
            kind, title = esc(entry["kind"]), esc(entry["name"])
            source = data_uri(read_image(twin(path.parent, entry["picture"])), THUMBNAIL)
            image = f'<img alt="{title}" title="{title}" src="{source}">'
            figures.append(f'<figure class="{kind}">{image}<figcaption>{kind}</figcaption></figure>')
        strips.append(f'<div class="scroll" tabindex="0"><div class="ranking">{"".join(figures)}</div></div>')
    return f"<h3>{esc(name)}, {esc(content['dataset'])}</h3>{''.join(strips)}"
