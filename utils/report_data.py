"""What the report reads: the folders of runs and of their floors, and what each of them has written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from omegaconf import OmegaConf

from utils.environment import read_environment
from utils.noise import NoiseSpec
from utils.results import is_number, read_json_lines, read_results
from utils.yaml_files import load_yaml

METHODS = {  # label of the rows: (name, pretrained on), in the paper's order from worst to best
    "dinov2": ("DINOv2", "noisy"),
    "nc": ("DINOv2 w/ NC", "denoised, then noisy"),
    "nct": ("DINOv2 w/ NCT", "denoised, then noisy, anchored"),
    "n2n": ("N2N + DINOv2", "denoised"),
    "clean": ("DINOv2 (clean)", "clean"),
}
FLOORS = {  # what needs no training here, through the same protocols: (name, pretrained on)
    "untrained": ("Untrained backbone", "nothing"),
    "pixels": ("Raw pixels", "nothing"),
    "public": ("Public backbone", "other images"),
}
RANK = {method: i for i, method in enumerate(METHODS | FLOORS)}
DEPTH = 3  # levels below a named folder on which runs are looked for, and above a run for its floors


@dataclass
class Run:
    """One run's folder: its config and whatever it has written so far."""

    path: Path
    config: dict
    rows: list[dict] = field(repr=False)
    metrics: list[dict] = field(repr=False)

    @property
    def method(self) -> str:
        return str(self.config.get("method", self.path.name))

    @property
    def noise(self) -> str:
        return str(self.config.get("noise", "none"))

    @property
    def dataset(self) -> str:
        data = self.config.get("data") or {}
        return str(data.get("name") or Path(str(data.get("root") or "?")).resolve().name)

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))

    @property
    def name(self) -> str:
        return (METHODS | FLOORS).get(self.method, (self.method, ""))[0]

    @property
    def is_floor(self) -> bool:
        return self.method in FLOORS

    @property
    def trial(self) -> bool:
        return bool(self.config.get("trial"))

    @property
    def environment(self) -> list[dict]:
        """One entry for each start of the training."""
        return read_environment(self.path)

    def detail(self, key: str) -> object:
        """A detail of the last row that has it: images, classes, crop, architecture; None in older rows."""
        return next((row["details"][key] for row in reversed(self.rows) if key in row["details"]), None)

    @property
    def crop(self) -> int | None:
        """Side of the evaluation crop in pixels."""
        return self.detail("crop") or (self.config.get("eval") or {}).get("crop")

    def collapse(self) -> tuple[str, float] | None:
        """How the run's last logged state is collapsed, and the epoch from which on it was; None when it is not."""
        states = [(row["collapsed"], row.get("epoch", 0)) for row in self.metrics if "collapsed" in row]
        if not states or not states[-1][0]:
            return None
        since = states[-1][1]
        for state, epoch in reversed(states):
            if not state:
                break
            since = epoch
        return states[-1][0], self.restart + since

    @property
    def stages(self) -> list[dict]:
        return (self.config.get("curriculum") or {}).get("stages") or []

    @property
    def restart(self) -> float:
        """Epochs of earlier stages whose weights the last one starts from; 0 for a run from scratch."""
        epochs = 0.0
        for before, stage in pairwise(self.stages):
            start = stage.get("from_epoch") or before.get("stop") or before.get("epochs") or 0
            epochs = 0.0 if (stage.get("init") or "scratch") == "scratch" else epochs + start
        return epochs

    @property
    def view(self) -> str | None:
        """The view that the run is meant to be evaluated on."""
        view = (self.config.get("eval") or {}).get("view") or (self.stages[-1].get("view") if self.stages else None)
        return "noisy" if view == "mix" else view

    def select(self, metric: str) -> list[dict]:
        """Rows of one metric under the run's own noise, view and data, in order of epochs; of equal epochs the last
        written.

        Protocols are never mixed: the one with the most epochs is taken, of equals the exact one.
        """
        protocols: dict[str, dict[float, dict]] = {}
        for row in self.rows:
            own = (
                row["noise"] == self.noise
                and row["dataset"] == self.dataset
                and row["view"] == (self.view or row["view"])
            )
            if row["metric"] == metric and own and isinstance(row["value"], int | float):
                protocols.setdefault(row["protocol"], {})[row["epoch"]] = row
        chosen = max(protocols, key=lambda name: (len(protocols[name]), name == "exact"), default=None)
        return [protocols[chosen][epoch] for epoch in sorted(protocols[chosen])] if chosen else []

    @property
    def trained_noise(self) -> str:
        """The noise of the images that the run trained on: none for the clean ceiling."""
        return "none" if self.view == "clean" else self.noise

    def robustness(self) -> dict[str, dict[str, float]]:
        """{metric: {noise: percent}} of the rows robustness_*, of the last epoch that has them."""
        rows = [row for row in self.rows if row["metric"].startswith("robustness_")]
        last = max((row["epoch"] for row in rows), default=None)
        found: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["epoch"] == last:
                found.setdefault(row["metric"], {})[row["noise"]] = row["value"]
        return found


def read_run(path: Path) -> Run:
    """Raises ValueError, naming the file, when there is no readable config."""
    config_path = path / "config.yaml"
    if not config_path.is_file():
        raise ValueError(f"{path} is no run: it has no config.yaml (name folders that dinov2.train wrote)")
    try:
        # References are not resolved: a saved config has none, and one from elsewhere could ask for the environment.
        config = dict(_plain(OmegaConf.to_container(load_yaml(config_path))))
        run = Run(path, config, read_results(path), [_figures(row) for row in read_json_lines(path / "metrics.jsonl")])
        _ = run.dataset, run.seed, run.restart, run.view, NoiseSpec.parse(run.noise)
    except Exception as error:  # YAML, OmegaConf and the disk each have errors of their own
        raise ValueError(f"{config_path} can't be read: {' '.join(str(error).split())}") from error
    return run


def _figures(row: dict) -> dict:
    """What of a row of metrics.jsonl can be drawn, and the word for a collapse."""
    return {key: v for key, v in row.items() if is_number(v) or (key == "collapsed" and isinstance(v, str))}


def _plain(content: object) -> object:
    """content with the texts that dinov2.config escaped as they were given."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_plain(value) for value in content]
    return re.sub(r"(\\*)\1\\\$\{", r"\1${", content) if isinstance(content, str) else content


def find_runs(paths: list[Path]) -> list[Run]:
    """The runs named and those below a named folder, with the floors that lie beside them; in the order of METHODS."""
    found: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is no folder")
        folders = list(folders_of_runs(path))
        if not folders:
            raise ValueError(f"{path} holds no run: no config.yaml in it or in the folders below it")
        for folder in folders:
            found.setdefault(folder.resolve(), read_run(folder))
    for run in list(found.values()):
        for above in run.path.resolve().parents[:DEPTH]:
            for config in sorted(above.glob("floors/*/*/config.yaml")):
                found.setdefault(config.parent, read_run(config.parent))
    return sorted(found.values(), key=lambda r: (r.dataset, r.noise, RANK.get(r.method, len(RANK)), r.method, r.seed))


def folders_of_runs(path: Path, depth: int = DEPTH) -> Iterator[Path]:
    """`path`, or the runs below it; floors are found by their runs, and trees of images hold none."""
    if (path / "config.yaml").is_file():
        yield path
    elif depth and not (path / "train").is_dir() and not (path / "val").is_dir():
        for below in sorted(path.iterdir()):
            if below.is_dir() and below.name != "floors" and not below.name.startswith("."):
                yield from folders_of_runs(below, depth - 1)


def find_denoisers(runs: list[Run]) -> list[Path]:
    """Folders denoiser/ beside the runs that have a log of a denoiser's training."""
    folders = dict.fromkeys(run.path.parent / "denoiser" for run in runs)
    return [folder for folder in folders if (folder / "metrics.jsonl").is_file()]
