"""What the report reads: the folders of runs and of their floors, and what each of them has written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from utils.nested import unescaped
from utils.noise import NoiseSpec
from utils.results import is_number, read_json_lines, read_results
from utils.text import one_line
from utils.yaml_files import load_yaml

WORDS = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("words.yaml")))
METHODS, FLOORS, OBJECTIVES = WORDS["methods"], WORDS["floors"], WORDS["objectives"]
SYSTEMS = METHODS | FLOORS  # in the order of tables and legends
DEPTH = 3  # levels below a named folder on which runs are looked for, and above a run for its floors


@dataclass
class Run:
    """One run's folder: its config and whatever it has written so far."""

    path: Path
    config: dict
    rows: list[dict] = field(repr=False)
    metrics: list[dict] = field(repr=False)

    def __post_init__(self):
        self.method = str(self.config.get("method", self.path.name))
        self.noise = str(self.config.get("noise", "none"))
        self.seed = int(self.config.get("seed", 0))
        self.trial = bool(self.config.get("trial"))
        self.is_floor = self.method in FLOORS
        data = self.config.get("data") or {}
        self.dataset = str(data.get("name") or Path(str(data.get("root") or "?")).resolve().name)
        self.stages = (self.config.get("curriculum") or {}).get("stages") or []
        # The view that it is meant to be evaluated on.
        view = (self.config.get("eval") or {}).get("view") or (self.stages[-1].get("view") if self.stages else None)
        self.view = "noisy" if view == "mix" else view
        # The noise of the images that it trained on: none for the clean oracle.
        self.trained_noise = "none" if self.view == "clean" else self.noise
        # What the method trains: DINOv2 in runs from before there were others.
        objective = str(self.config.get("objective") or "dinov2")
        words = SYSTEMS.get(self.method, {"name": self.method, "pretrained": ""})
        self.objective, self.pretrained = OBJECTIVES.get(objective, objective), words["pretrained"]
        self.name = words["name"].replace("DINOv2", self.objective)
        # Place in tables and legends; what is not known here comes last, by the alphabet.
        self.rank = sort_key(OBJECTIVES, objective), sort_key(SYSTEMS, self.method), self.seed

    def detail(self, key: str) -> Any:
        """A detail of the last row that has it: images, classes, crop, architecture; None in older rows.

        Figures without labels may be of the training images: those rows are left out.
        """
        rows = (row["details"] for row in reversed(self.rows) if row["details"].get("split") != "train")
        return next((details[key] for details in rows if key in details), None)

    @property
    def crop(self) -> int | None:
        """Side of the evaluation crop in pixels."""
        return self.detail("crop") or (self.config.get("eval") or {}).get("crop")

    def collapse(self) -> tuple[str, float] | None:
        """How the run's last logged state is collapsed, and the epoch from which on it was; None when it is not."""
        states = [(row["collapsed"], row.get("epoch", 0)) for row in self.metrics if "collapsed" in row]
        if not states or not states[-1][0]:
            return None
        sound = [i for i, (state, _) in enumerate(states) if not state]
        since = states[sound[-1] + 1 if sound else 0][1]
        return states[-1][0], self.restart + since

    @property
    def restart(self) -> float:
        """Epochs of earlier stages whose weights the last one starts from; 0 for a run from scratch."""
        epochs = 0.0
        for before, stage in pairwise(self.stages):
            start = stage.get("from_epoch") or before.get("stop") or before.get("epochs") or 0
            epochs = 0.0 if (stage.get("init") or "scratch") == "scratch" else epochs + start
        return epochs

    def select(self, metric: str) -> list[dict]:
        """Rows of one metric under the run's own noise, view and data, one per epoch (the last written), in order.

        Protocols are never mixed: the one with the most epochs is taken, of equals the exact one.
        """
        own = {"metric": metric, "noise": self.noise, "dataset": self.dataset}
        own |= {"view": self.view} if self.view else {}
        protocols: dict[str, dict[float, dict]] = {}
        for row in self.rows:
            if all(row[key] == value for key, value in own.items()):
                protocols.setdefault(row["protocol"], {})[row["epoch"]] = row
        chosen = max(protocols, key=lambda name: (len(protocols[name]), name == "exact"), default=None)
        return [protocols[chosen][epoch] for epoch in sorted(protocols[chosen])] if chosen else []

    def robustness(self) -> dict[str, dict[str, float]]:
        """{metric: {noise: percent}} of the rows robustness_*, of the last epoch that has them."""
        rows = [row for row in self.rows if row["metric"].startswith("robustness_")]
        last = max((row["epoch"] for row in rows), default=None)
        found: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["epoch"] == last:
                found.setdefault(row["metric"], {})[row["noise"]] = row["value"]
        return found


def sort_key(names: dict, name: str) -> tuple[int, str]:
    """Sorts the names known here as they stand, the others behind them by the alphabet."""
    return list(names).index(name) if name in names else len(names), name


def slot(run: Run) -> int:
    """Number of the method's colour and marker in every plot."""
    return sort_key(METHODS, run.method)[0]


def label(run: Run, runs: list[Run]) -> str:
    """The method's name, with noise, seed or folder where several of `runs` share it."""
    same = [other for other in runs if other.name == run.name]
    for text, key in ((f", {run.noise}", "noise"), (f", seed {run.seed}", "seed"), (f" ({run.path.name})", "path")):
        if len(same) > 1 and len({getattr(other, key) for other in same}) == len(same):
            return run.name + text
    return run.name if len(same) == 1 else f"{run.name} ({run.path})"


def read_run(path: Path) -> Run:
    """Raises ValueError, naming the file, when there is no readable config."""
    config_path = path / "config.yaml"
    if not config_path.is_file():
        raise ValueError(f"{path} is no run: it has no config.yaml (name folders that dinov2.train wrote)")
    try:
        # References are not resolved: a saved config has none, and one from elsewhere could ask for the environment.
        config = dict(unescaped(OmegaConf.to_container(load_yaml(config_path))))
        metrics = [_keep_figures(row) for row in read_json_lines(path / "metrics.jsonl")]
        run = Run(path, config, read_results(path), metrics)
        _ = run.restart, NoiseSpec.parse(run.noise)
    except Exception as error:  # YAML, OmegaConf and the disk each have errors of their own
        raise ValueError(f"{config_path} can't be read: {one_line(error)}") from error
    return run


def _keep_figures(row: dict) -> dict:
    """What can be drawn of a row of metrics.jsonl, and the word for a collapse."""
    return {key: v for key, v in row.items() if is_number(v) or (key == "collapsed" and isinstance(v, str))}


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
    return sorted(found.values(), key=lambda run: (run.dataset, run.noise, run.rank))


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


def denoiser_name(folder: Path) -> str:
    """The noise that a denoiser was trained under, as its config says; else the folder."""
    try:
        return str(json.loads((folder / "config.json").read_text())["noise"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder.parent.name}/{folder.name}"
