"""How the values of a folder's files become [0, 1]: one rule, the same in denoiser, training, evaluation and export.

    full            uint8 stays as it is, uint16 / 65535, floats must lie in [0, 1]; all else is refused
    range=[lo,hi]   (x - lo) / (hi - lo), clipped to [0, 1]
    log=[lo,hi]     log(x / lo) / log(hi / lo), clipped: noise that multiplies becomes one that adds
and, estimated over a sample of the folder and then written down as one of those three:
    auto            full for 8 bits and floats in [0, 1]; the bits in use for uint16; percentile for all else
    percentile      range from the 0.1th to the 99.9th percentile
    log             log between the same percentiles of the positive values
One rule serves all channels. With range and log a NaN becomes the median of its image; with full it is refused.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.array_files import in_range
from utils.images import MAX_PIXELS, MAX_PIXELS_HELP, MIXED, ImageError, read_manifest, stored_values
from utils.readers import STACKS
from utils.sampler import spread_evenly
from utils.text import count_of

ESTIMATED = ("auto", "percentile", "log")
HELP = "auto, full, percentile, range=[lo,hi], log or log=[lo,hi]"
SAMPLE = 64  # images that an estimate looks at, spread evenly over the sorted list
PIXELS = 1 << 16  # of each of them, at most; of more than four channels as many values as four have
TAILS = 0.1, 99.9  # percentiles
DARK = 4  # uint16 whose 99.9th percentile lies below this part of its bits' range would be read as nearly black


@dataclass(frozen=True)
class Values:
    """A rule, known to the last number; calling it scales an array. str() and parse() are each other's inverse."""

    kind: str = "full"  # full | range | log
    low: float = 0.0  # in the units of the files
    high: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Values":
        """ "full", "range=[lo,hi]" or "log=[lo,hi]". ValueError for all else, with what may be written."""
        if text == "full":
            return cls()
        match = re.fullmatch(r"(range|log)=\[([^,\]]+),([^,\]]+)\]", text.replace(" ", ""))
        try:
            kind, low, high = match[1], float(match[2]), float(match[3])
        except (TypeError, ValueError):
            raise ValueError(f"values {text!r} is not known; write {HELP}") from None
        if not -np.inf < low < high < np.inf or (kind == "log" and low <= 0):
            bounds = "0 < lo < hi" if kind == "log" else "lo < hi"
            raise ValueError(f"values {text!r}: the ends must be finite, {bounds}")
        return cls(kind, low, high)

    def __str__(self) -> str:
        return "full" if self.kind == "full" else f"{self.kind}=[{_exact_text(self.low)},{_exact_text(self.high)}]"

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """An array as a file holds it -> uint8 as it is (full), else float32 in [0, 1]. ValueError: see the module."""
        if self.kind == "full":
            return in_range(array)
        exact = np.float32 if array.dtype.itemsize <= 2 or array.dtype == np.float32 else np.float64
        x = _without_nan(array.astype(exact))
        if self.kind == "log":
            x = np.log(np.clip(x, self.low, self.high) / self.low) / np.log(self.high / self.low)
        else:
            x = (x - self.low) / (self.high - self.low)
        return np.clip(x, 0, 1).astype(np.float32)

    def restore(self, image: np.ndarray) -> np.ndarray:
        """Values in [0, 1] back in the units of the files, float32; with "full" they are in [0, 1] already."""
        if self.kind == "log":
            return (self.low * (self.high / self.low) ** image).astype(np.float32)
        return (self.low + image * (self.high - self.low)).astype(np.float32)


FULL = Values()


def _exact_text(number: float) -> str:
    """The number in six digits, or in as many as it takes to read it back."""
    return short if float(short := f"{number:.6g}") == number else repr(number).removesuffix(".0")


def _without_nan(x: np.ndarray) -> np.ndarray:
    holes = np.isnan(x)
    if holes.any():
        if holes.all():
            raise ValueError("all of its values are NaN")
        x[holes] = np.median(x[~holes])
    return x


def check(text: str, name: str) -> None:
    """ValueError that begins with the option's name, where text is no rule and no way to estimate one."""
    if text not in ESTIMATED:
        try:
            Values.parse(text)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def is_consistent(text: str, values: Values) -> bool:
    """Whether `text` is the rule, or names a way to estimate it that may have given it."""
    if text in ESTIMATED:
        return text == "auto" or values.kind == {"percentile": "range", "log": "log"}[text]
    return Values.parse(text) == values


def add_options(parser: argparse.ArgumentParser, default: str | None = "auto") -> None:
    """What every tool must know of the files: --values (default: None for those of a model), --stack, --mixed and
    --max-pixels."""
    known = "as the model was trained, else auto" if default is None else default
    parser.add_argument("--values", default=default, help=f"what scales the files: {HELP} (default {known})")
    parser.add_argument("--stack", choices=STACKS, default="refuse", help="files of several pages (default refuse)")
    parser.add_argument("--mixed", choices=MIXED, default="refuse", help="images of other channels (default refuse)")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help=MAX_PIXELS_HELP)


def configured_rule(text: str) -> Values:
    """The rule that a run's config names; "full" where it would be estimated over images that are not there."""
    return FULL if text in ESTIMATED else Values.parse(text)


# --- of a folder ----------------------------------------------------------------------------------------------------
def resolve(
    text: str, root: Path | str, relatives: list[str], channels: int, max_pixels: int = MAX_PIXELS
) -> tuple[Values, str]:
    """The rule of the images root/relatives that `text` names, and a sentence that says what was chosen and why.

    A noisy or denoised tree of ours holds scaled values; it has the rule that it was made with. ValueError where that
    is another one, and where no rule can be found.
    """
    made = read_manifest(root)
    if made is not None:
        values = Values.parse(made.get("values", "full"))
        if not is_consistent(text, values):
            raise ValueError(f"{root} was made with values {values}, not {text}; name the folder that it was made of")
        return values, f"values: {values}, as {root} was made with"
    if text not in ESTIMATED:
        return Values.parse(text), f"values: {text}, as given"
    arrays = _read_sample(root, relatives, channels, max_pixels)
    try:
        values, reason = _estimate_rule(text, arrays)
    except ValueError as error:
        raise ValueError(f"{root}: {error}") from None
    if values.kind != "full":  # six digits of an estimate are enough
        values = Values.parse(f"{values.kind}=[{values.low:.6g},{values.high:.6g}]")
    return values, f"values: {values} ({text}: {reason}, by {count_of(len(arrays), 'image')})"


def manifest_entry(values: Values) -> dict[str, str]:
    """The entry of a tree's manifest; none for "full", which manifests of earlier versions do not name."""
    return {} if values.kind == "full" else {"values": str(values)}


def rule_for_reading(values: Values, root: Path | str) -> Values:
    """What scales the files below root: nothing more in a tree of ours, which holds scaled values."""
    return values if read_manifest(root) is None else FULL


def is_deep(root: Path | str, relatives: list[str], channels: int, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether any image of the sample has more than 8 bits."""
    return any(array.dtype != np.uint8 for array in _read_sample(root, relatives, channels, max_pixels))


def _read_sample(root: Path | str, relatives: list[str], channels: int, max_pixels: int) -> list[np.ndarray]:
    """Stored values of some pixels of each of SAMPLE images; files that cannot be read are passed over."""
    arrays, error, relatives = [], None, sorted(relatives)
    for index in spread_evenly(len(relatives), SAMPLE):
        try:
            array = stored_values(Path(root, relatives[index]), channels, max_pixels)
        except ImageError as caught:
            error = caught
            continue
        flat = array.reshape(-1, array.shape[-1])
        most = PIXELS * 4 // max(4, flat.shape[1])
        arrays.append(flat[:: -(-len(flat) // most)].copy())  # a view would keep the whole image in memory
    if not arrays:
        raise error
    counts = Counter(array.shape[1] for array in arrays)
    if len(counts) > 1 and set(counts) != {1, 3}:
        found = ", ".join(f"{number} of {count}" for count, number in sorted(counts.items()))
        raise ValueError(
            f"{root} mixes images of several channel counts ({found}, by {len(arrays)} images): set data.mixed of a "
            f"run and --mixed of a tool to keep, to keep those of {channels}"
        )
    return arrays


def _estimate_rule(text: str, arrays: list[np.ndarray]) -> tuple[Values, str]:
    """The rule and the reason. ValueError where the values allow none."""
    if text == "auto":
        return _choose_rule(arrays)
    pooled = np.concatenate([array.reshape(-1).astype(np.float64) for array in arrays])
    finite = pooled[np.isfinite(pooled)]
    if text == "log":
        finite = finite[finite > 0]
    if not finite.size or finite.min() == finite.max():
        raise ValueError(f"values={text} needs {'positive ' if text == 'log' else ''}values that differ")
    low, high = np.percentile(finite, TAILS)
    low, high = (low, high) if low < high else (finite.min(), finite.max())
    holes = f", {np.isnan(pooled).mean():.2%} NaN" if np.isnan(pooled).any() else ""
    reason = f"{_dtype_names(arrays)} from {pooled[np.isfinite(pooled)].min():g} to {finite.max():g}{holes}"
    return Values("log" if text == "log" else "range", float(low), float(high)), reason


def _choose_rule(arrays: list[np.ndarray]) -> tuple[Values, str]:
    deep = [array for array in arrays if array.dtype != np.uint8]
    if not deep:
        return FULL, "8 bits"
    low, high = (float(end([end(array) for array in deep])) for end in (np.min, np.max))  # NaN where there is one
    sixteen = all(array.dtype.kind == "u" and array.dtype.itemsize == 2 for array in deep)
    floats = all(array.dtype.kind == "f" for array in deep)
    if floats and low >= 0 and high <= 1:
        return FULL, "floats in [0, 1]"
    values, reason = _estimate_by_bits(deep, int(high)) if sixteen else _estimate_rule("percentile", deep)
    if len(deep) < len(arrays) and values.kind != "full":
        raise ValueError(
            f"8-bit files lie beside {_dtype_names(deep)} up to {high:g}: no rule fits both; give range=[lo,hi] or full"
        )
    return values, reason


def _estimate_by_bits(arrays: list[np.ndarray], largest: int) -> tuple[Values, str]:
    """Of uint16: the range of the bits in use, or the percentiles where nearly all values are dark in it."""
    bits = max(8, largest.bit_length())
    top = 65535 if bits > 14 else 2**bits - 1
    bright = np.percentile(np.concatenate([array.reshape(-1) for array in arrays]), TAILS[1])
    reason = f"uint16 up to {largest}, {16 if bits > 14 else bits} bits"
    if bright < top / DARK and bright > 0:
        return _estimate_rule("percentile", arrays)[0], f"{reason}, but 99.9 % of the values are at most {bright:g}"
    return (FULL if top == 65535 else Values("range", 0, top)), reason


def _dtype_names(arrays: Iterable[np.ndarray]) -> str:
    return " and ".join(sorted({array.dtype.name for array in arrays}))
