"""A map of the features: the CLS token of each image as a point in two dimensions, with thumbnails.

    python -m dinov2.eval.map run=runs/nct

Shows eval.map.images validation images or, where there are none, training images, in the run's evaluation view, with or
without labels. Writes <run>/map.png and, for the report, map.json and map_thumbs.png; the row is the percentage of the
variance that the map shows (pca).
"""

from collections.abc import Iterator

from omegaconf import DictConfig
from torch import nn

from dinov2.eval import common
from dinov2.eval.features import eval_view, features_of, shown_dataset
from utils import distributed
from utils.feature_map import thumbnail, write_map
from utils.sampler import spread_evenly


def evaluate(backbone: nn.Module, cfg: DictConfig, job: common.Job) -> Iterator[common.Result]:
    """Writes the three files and yields map_explained (percent; not for umap)."""
    view, method = eval_view(cfg), cfg.eval.map.method
    dataset = shown_dataset(cfg, (view,))
    dataset.keep(spread_evenly(len(dataset), cfg.eval.map.images))
    values = features_of(backbone, cfg, dataset).cpu().numpy()
    labels = [dataset.classes[label] if label >= 0 else None for label in dataset.labels]
    if not distributed.is_main():
        return
    tiles = [thumbnail(dataset.read(i, [view])[0]) for i in range(len(dataset))]
    explained = write_map(job.run / "map.png", list(dataset.relatives), values, tiles, labels, method)
    if explained:
        yield "map_explained", 100 * sum(explained), {"images": len(dataset), "method": method}


if __name__ == "__main__":
    common.main("map", evaluate, __doc__)
