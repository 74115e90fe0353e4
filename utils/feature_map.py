"""A map of features: each image is a point in two dimensions, some with a thumbnail.

write_map("DIR/map.png", …) also writes DIR/map.json, from which a page can draw the map:

    method      "pca" | "umap"
    points      [[x, y, path, label or null], ...], one per image
    thumbnails  name of a picture of all thumbnails, in the order of the points, row by row; `tile` pixels per side,
                `columns` of them in a row
    explained   of pca: the fractions of the variance that x and y explain; of umap: []
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from utils.files import atomic_path, write_text
from utils.images import visible
from utils.text import count_of

METHODS = ("pca", "umap")
MOST = 1000  # points; more cannot be distinguished
TILE = 48  # pixels per side
SIZE = (1200, 900)  # pixels of the picture
# Paul Tol's "muted" colours, distinguishable for the colour-blind.
COLOURS = ("#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")


def project(values: np.ndarray, method: str) -> tuple[np.ndarray, list[float]]:
    """Features [N, F] → places [N, 2] and the fractions of the variance that the two axes explain.

    Features are L2-normalised, as for cosine similarity. pca: the axes of the largest variance, each turned so that its
    largest weight is positive. umap: McInnes et al. 2018, with a fixed seed. ValueError: fewer than 3 images, an
    unknown method, or UMAP if it is not installed.
    """
    if method not in METHODS:
        raise ValueError(f"a map by {method!r}: choose {' or '.join(METHODS)}")
    if len(values) < 3:
        raise ValueError(f"a map of {count_of(len(values), 'image')}: give at least 3")
    rows = values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-12)
    if method == "umap":
        return _project_by_umap(rows), []
    rows = rows - rows.mean(axis=0)
    _, singular, axes = np.linalg.svd(rows, full_matrices=False)
    axes = np.pad(axes, ((0, max(0, 2 - len(axes))), (0, 0)))[:2]  # a single feature has no second axis
    axes = axes * np.where(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], axis=1) < 0, -1, 1)
    fractions = singular**2 / max((singular**2).sum(), 1e-12)
    return rows @ axes.T, fractions[:2].tolist()


def _project_by_umap(rows: np.ndarray) -> np.ndarray:
    try:
        import umap
    except ImportError as error:
        raise ValueError("a map by umap needs it: pip install 'noise-robust-dino[umap]'") from error
    return umap.UMAP(n_neighbors=min(15, len(rows) - 1), metric="cosine", random_state=0, n_jobs=1).fit_transform(rows)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """An image [H, W, C] as uint8 [TILE, TILE, 3]: its central square."""
    shown = visible(image)
    shown = shown.repeat(3, axis=2) if shown.shape[2] == 1 else shown
    side = min(shown.shape[:2])
    top, left = ((length - side) // 2 for length in shown.shape[:2])
    square = Image.fromarray(shown[top : top + side, left : left + side])
    return np.asarray(square.resize((TILE, TILE), Image.Resampling.BICUBIC))


def write_map(
    path: Path, names: list[str], values: np.ndarray, tiles: list[np.ndarray], labels: list[str | None], method: str
) -> list[float]:
    """The picture `path` (.png), and beside it NAME.json and NAME_thumbs.png.

    values: float32 [N, F]; tiles: of thumbnail(), [TILE, TILE, 3] each; labels: names of classes, None: unknown.
    Returns the explained fractions of the variance, as project() does.
    """
    places, explained = project(values, method)
    path.parent.mkdir(parents=True, exist_ok=True)
    sprite, columns = path.with_name(f"{path.stem}_thumbs.png"), int(np.ceil(np.sqrt(len(names))))
    points = [[*map(float, place), *rest] for place, *rest in zip(places, names, labels, strict=True)]
    content = {"method": method, "points": points, "thumbnails": sprite.name, "tile": TILE, "columns": columns}
    _write_png(sprite, _tile_thumbnails(tiles, columns))
    _write_png(path, _draw_points(places, tiles, labels))
    write_text(path.with_suffix(".json"), json.dumps(content | {"explained": explained}))
    return explained


def _write_png(path: Path, image: Image.Image) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def _tile_thumbnails(tiles: list[np.ndarray], columns: int) -> Image.Image:
    sprite = np.full((-(-len(tiles) // columns) * TILE, columns * TILE, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * TILE, number % columns * TILE
        sprite[top : top + TILE, left : left + TILE] = tile
    return Image.fromarray(sprite)


def _draw_points(places: np.ndarray, tiles: list[np.ndarray], labels: list[str | None]) -> Image.Image:
    """Points in the colours of their labels, and as many thumbnails as fit without overlap."""
    low, high = places.min(axis=0), places.max(axis=0)
    xy = (places - low) / np.maximum(high - low, 1e-12)
    xy[:, 1] = 1 - xy[:, 1]  # rows of a picture count downwards
    xy = (TILE + xy * (np.array(SIZE) - 2 * TILE)).round().astype(int)
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    number = {label: place for place, label in enumerate(sorted({label for label in labels if label is not None}))}
    colours = ["#888888" if label is None else COLOURS[number[label] % len(COLOURS)] for label in labels]
    for (x, y), colour in zip(xy.tolist(), colours, strict=True):
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
    taken: list[tuple[int, int]] = []
    for (x, y), tile, colour in zip(xy.tolist(), tiles, colours, strict=True):
        if all(max(abs(x - a), abs(y - b)) > TILE + 6 for a, b in taken):
            taken.append((x, y))
            image.paste(Image.fromarray(tile), (x - TILE // 2, y - TILE // 2))
            edge = TILE // 2 + 2
            draw.rectangle((x - edge, y - edge, x + edge, y + edge), outline=colour, width=2)
    return image
