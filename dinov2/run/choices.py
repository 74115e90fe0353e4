"""Settings for a folder of images by what was found in it, each with its reason.

"measured" in a reason refers to docs/small_data.md; "published" to the paper; all else is said to be a rule of thumb.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from omegaconf import OmegaConf

from dinov2.run.survey import Survey, mean_and_std

PASSES = 100  # over the images, of a whole schedule
LEAST_EPOCH = 10  # iterations: checkpoints and logs cost more than shorter ones
RESIDENT = 1 << 30  # bytes of decoded images in memory
SMALL = 20_000  # images; with fewer the settings that were measured on thousands
PUBLISHED = ("imagenet100", "imagenet1k")  # scales whose crops, heads and epochs stay
FOLLOWED = ("train.epochs", "train.batch_size", "crops.global_size")  # keys that others follow
RULE = "rule of thumb"


@dataclass(frozen=True)
class Choice:
    key: str
    value: object
    reason: str


@dataclass(frozen=True)
class Hardware:
    gpu: bool
    cores: int

    @classmethod
    def here(cls) -> Hardware:
        import torch

        return cls(torch.cuda.is_available(), os.cpu_count() or 1)


def choose_scale(survey: Survey, gpu: bool, weights: str | None) -> Choice:
    if survey.side < 48:
        return Choice("scale", "quickstart", f"images of {survey.side} px: measured on 1,442 digits of 32 px")
    why = f"{survey.count} images, {survey.side} px" if weights is None else "continued training, small heads"
    if weights is None and survey.count >= SMALL and survey.side >= 160:
        if gpu:
            return Choice("scale", "imagenet100", f"{why}: the published settings")
        why += ", and no GPU"
    return Choice("scale", "imagenette", f"{why}: measured on 9,469 images of 96 px")


def choose(
    survey: Survey, scale: str, base: dict, hardware: Hardware, given: dict[str, str], patch: int, weights: str | None
) -> list[Choice]:
    """The keys that the folder decides, over those of a scale (base: its file's content); of a YAML of the user's, only
    those that it leaves open.

    given: what the user has set, which others follow. patch: of the backbone, px. weights: to continue from.
    """
    small, own = scale not in PUBLISHED, scale.endswith((".yaml", ".yml"))
    if own:
        set_there = {key: OmegaConf.select(OmegaConf.create(base), key) for key in FOLLOWED}
        given = {key: str(value) for key, value in set_there.items() if value is not None} | given
    found = _choose_data(survey, hardware)
    found += _choose_crops(survey, hardware, patch, given) if small else []
    found += _choose_schedule(survey, base, given, small)
    if small and weights is None and given.get("objective", "dinov2") in ("dinov2", "dino", "ibot"):
        prototypes = 256 if len(survey.train.relatives) < 2000 else 1024
        reason = "no more than crops in some batches (measured: 256 on 1,442 images, 1,024 on 9,469)"
        found += [Choice(f"{head}.prototypes", prototypes, reason) for head in ("dino", "ibot")]
    if weights is not None:
        restart = next(choice.value for choice in found if choice.key == "curriculum.restart_epoch")
        found += _choose_continued(base, restart)
    return [choice for choice in found if not own or OmegaConf.select(OmegaConf.create(base), choice.key) is None]


def _choose_data(survey: Survey, hardware: Hardware) -> list[Choice]:
    found = [Choice("data.in_chans", survey.channels, "as the files have")]
    if survey.channels != 3:
        mean, std = mean_and_std(survey)
        found += [Choice("data.mean", mean, "of 16 of the images"), Choice("data.std", std, "of 16 of the images")]
    found.append(Choice("data.values", str(survey.rule), "see above"))
    canvas = max(h for h, _ in survey.shapes) * max(w for _, w in survey.shapes)  # all are padded to the largest sides
    size = survey.count * canvas * survey.channels * (4 if survey.deep else 1) * 2  # noisy and denoised
    resident = size <= RESIDENT
    held = "are" if resident else "are not"
    reason = f"{size / 1e9:.2g} GB decoded, noisy and denoised, {held} held in memory ({RULE})"
    found.append(Choice("data.resident", resident, reason))
    found.append(Choice("data.workers", min(8, hardware.cores) if not resident else 0, f"{hardware.cores} cores"))
    found.append(Choice("data.storage", "on_the_fly", "no noisy copy on the disk is needed"))
    return found


def _choose_crops(survey: Survey, hardware: Hardware, patch: int, given: dict[str, str]) -> list[Choice]:
    """Global crops are as large as fits the image, the schedule and the machine; local ones half of them."""
    side = survey.side
    wanted = 32 if side < 48 else 64 if side < 80 else 96 if side < 144 else 128
    reason = f"images of {side} px"
    if hardware.gpu and side >= 256:
        wanted, reason = 224, f"images of {side} px, and a GPU"
    measured = {32: "measured on digits of 32 px", 64: "measured on images of 96 px"}.get(wanted, RULE)
    size = int(given.get("crops.global_size", max(2, round(wanted / patch)) * patch))
    local = max(1, round(size / 2 / patch)) * patch
    found = [
        Choice("crops.global_size", size, f"{reason} ({measured})"),
        Choice("crops.local_size", local, f"half of the global crops ({RULE})"),
    ]
    if side < 48:
        found.append(Choice("crops.flip", 0.5, f"a mirrored image is as good; 0 where it is not ({RULE})"))
    return [
        *found,
        Choice("eval.crop", size, "as large as the global crops"),
        Choice("eval.resize", size * 9 // 8, f"an eighth more, of which the centre is cut ({RULE})"),
    ]


def _choose_schedule(survey: Survey, base: dict, given: dict[str, str], small: bool) -> list[Choice]:
    train = {"batch_size": 64, "epochs": PASSES} | base.get("train", {})
    n, largest, epochs = len(survey.train.relatives), train["batch_size"], int(given.get("train.epochs", 0))
    batch = largest
    while batch > max(2, n // 2):
        batch //= 2
    batch = int(given.get("train.batch_size", batch))
    length = max(LEAST_EPOCH, -(-n // batch))
    total = epochs or (PASSES if small else train["epochs"])
    restart = min(max(1, round(0.7 * total)), total - 1) if total > 1 else 1
    noisy = max(1, total - restart)
    by_size = "the scale's" if batch == largest else f"at most half of {n} images ({RULE})"
    passes = "one pass over the images" if length > LEAST_EPOCH else f"at least {LEAST_EPOCH} iterations ({RULE})"
    why = "as asked" if epochs else f"{total * length} iterations; 330 taught the digits something, measured ({RULE})"
    why = why if small or epochs else "published"
    ratio = "the paper's proportion, 140 of 200"
    warmup = max(0, min(total // 20, 10))
    temp_warmup = min(base.get("teacher", {}).get("warmup_temp_epochs", 30), total)
    knn_every = max(1, total // 10) if survey.labelled and survey.val else 0
    return [
        Choice("train.batch_size", batch, by_size),
        Choice("train.epoch_length", length, passes),
        Choice("train.epochs", total, why),
        Choice("curriculum.restart_epoch", restart, ratio),
        Choice("curriculum.noisy_epochs", noisy, "the epochs that are left"),
        Choice("anchor.epoch", restart, "the epoch restarted from"),
        Choice("optim.warmup_epochs", warmup, f"a twentieth of the epochs ({RULE})"),
        Choice("curriculum.noisy_set", {"optim.warmup_epochs": min(warmup, noisy // 10)}, f"a tenth of them ({RULE})"),
        Choice("teacher.warmup_temp_epochs", temp_warmup, "the scale's"),
        Choice("train.eval_every", max(1, total // 5), f"five checkpoints are kept ({RULE})"),
        Choice("train.checkpoint_every", max(1, total // 20), f"what a kill may cost ({RULE})"),
        Choice("train.keep_last", 1, "for resuming"),
        Choice("train.knn_every", knn_every, "where there are labels"),
    ]


def _choose_continued(base: dict, epochs: int) -> list[Choice]:
    """What keeps a backbone that was trained elsewhere. epochs: of the stage that starts from it."""
    rate = base.get("optim", {}).get("base_lr", 0.004) / 10
    gently = "a tenth, so that the weights are not destroyed (usual advice, not measured)"
    alone = f"the fresh heads train alone first, a tenth of {epochs} epochs ({RULE})"
    return [
        Choice("optim.base_lr", rate, gently),
        Choice("optim.head_warmup_epochs", min(5, -(-epochs // 10)), alone),
    ]


def choose_denoiser(survey: Survey, trial: int | None) -> tuple[list[str], str]:
    """Options of Neighbor2Neighbor.train, and the reason. trial: steps of a trial."""
    depth = 3 if survey.side < 96 else 4
    crop = 32 if survey.side < 48 else 64 if survey.side < 96 else 96
    steps = trial or min(20_000, max(1000, 8 * survey.count // 16))
    words = ["--epochs", "8", "--steps", str(steps), "--batch-size", "16", "--crop", str(crop), "--depth", str(depth)]
    words += ["--init-scale", "1", "--channels", str(survey.channels), "--values", str(survey.rule)]
    passes = "a trial" if trial else f"eight passes over the images, 1,000 steps at least and 20,000 at most ({RULE})"
    return words, f"{steps} steps of 16 crops of {crop} px: {passes}"
