"""Detects collapse of the teacher: the mutual information of image and prototype, monitored during training.

    I = H(mean p) - mean H(p)          p: the teacher's targets of the crops in a window

I is 0 when every image gets the same target: the uniform one (both entropies at ln K) or one prototype (both at 0),
and at most ln K. While it stays near 0 nothing is distilled, however well the loss falls.
"""

from omegaconf import DictConfig, OmegaConf

from dinov2.objectives.diagnostics import Information
from utils import distributed

WINDOW = 256  # crops at least, over all ranks: I is overestimated on few images
NEGLIGIBLE = 0.01  # of ln K
PATIENCE = 5  # windows in a row below it, after the learning rate's warm-up
ADVICE = {  # kind of collapse: keys to change, and how
    "uniform": {"teacher.warmup_temp": "lower", "teacher.temp": "lower", "dino.prototypes": "fewer"},
    "one prototype": {"teacher.centering": "sinkhorn_knopp", "teacher.temp": "higher", "optim.base_lr": "lower"},
    "same for all": {"teacher.warmup_temp": "lower", "optim.base_lr": "lower", "dino.koleo_weight": "higher"},
}


class Collapsed(ValueError):
    """Training stopped because its targets carry no information (train.on_collapse: stop)."""


def classify(found: dict[str, float]) -> str:
    """Which collapse: "" for none, "uniform", "one prototype", or "same for all" in between."""
    most = found["log_prototypes"]
    if found["information"] >= NEGLIGIBLE * most:
        return ""
    if found["target_entropy"] > 0.9 * most:
        return "uniform"
    return "one prototype" if found["target_entropy_of_mean"] < 0.1 * most else "same for all"


class CollapseMonitor:
    """Measures a window of targets before each row of the log, and warns once when a run has collapsed.

    The verdict is on the targets of CLS tokens or, where dino.weight is 0, of masked patches.
    """

    def __init__(self, cfg: DictConfig):
        self.cfg, self.information = cfg, Information()
        self.per_step = 2 * cfg.train.batch_size  # global crops
        self.steps = -(-WINDOW // self.per_step)
        self.collected = 0  # crops in the window
        self.tokens = "cls" if cfg.dino.weight > 0 else "patches"
        self.windows = 0  # in a row below NEGLIGIBLE
        self.since = 0  # iteration of the first of them
        self.kind = ""  # of the collapse, once it is one
        self.found: dict[str, float] = {}  # entropies and I of self.tokens in the last window
        self.warned = False

    def window(self, iteration: int) -> Information | None:
        """What step `iteration` (from 0) adds its targets to; None except in the last steps before a row of the log."""
        return self.information if -(iteration + 1) % self.cfg.train.log_every < self.steps else None

    def read(self, iteration: int, steps: int) -> dict[str, float | str]:
        """Columns of metrics.jsonl after `iteration` steps, `steps` of them since the last call; none until the window
        is full. All ranks call it."""
        self.collected += min(steps, self.steps) * self.per_step
        if self.collected < WINDOW or not self.information.sums:
            return {}
        self.collected, found = 0, self.information.read()
        self.found = found[self.tokens]
        self.update_verdict(iteration, classify(self.found))
        columns: dict[str, float | str] = {"collapsed": self.kind}
        for name, values in found.items():
            most = values["log_prototypes"]
            columns |= {f"{key}_{name}": value for key, value in values.items() if key != "log_prototypes"}
            columns |= {f"information_{name}_ratio": values["information"] / most, "log_prototypes": most}
        return columns

    def update_verdict(self, iteration: int, kind: str) -> None:
        if not kind:
            self.windows, self.kind = 0, ""
        elif iteration > self.cfg.optim.warmup_epochs * self.cfg.train.epoch_length:
            self.since = self.since if self.windows else iteration
            self.windows += 1
            self.kind = kind if self.windows >= PATIENCE else ""

    def report(self, at_end: bool = False) -> None:
        """Warns of a collapse, once and again at the end of training, or raises Collapsed (train.on_collapse: stop).
        All ranks call it."""
        if not self.kind or self.warned and not at_end:
            return
        if self.cfg.train.on_collapse == "stop":
            raise Collapsed(self.sentence())
        self.warned = True
        distributed.print_on_main(f"warning: {self.sentence()}")

    def sentence(self) -> str:
        what = {
            "uniform": "the teacher gives every image the same, uniform target",
            "one prototype": "the teacher gives every image the same prototype",
            "same for all": "the teacher gives every image nearly the same target",
        }[self.kind]
        advice = ", ".join(f"{key}={OmegaConf.select(self.cfg, key)} ({how})" for key, how in ADVICE[self.kind].items())
        most, information = self.found["log_prototypes"], self.found["information"]
        return (
            f"{self.cfg.output_dir}: {what} since iteration {self.since}: I = {information:.4f} nats, "
            f"{100 * information / most:.2f} % of ln K = {most:.2f}; nothing is distilled. "
            f"What to change first: {advice}; see docs/small_data.md"
        )
