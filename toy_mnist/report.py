"""Table and plots of the toy's results.jsonl."""

from __future__ import annotations

import statistics
from pathlib import Path

from utils.files import atomic_path, write_text
from utils.noise import Gauss, NoiseSpec
from utils.results import read_results

PAPER_NOISE = "gauss102"  # 102 / 255 = 0.4, the standard deviation of the paper's toy
# Accuracy on MNIST in the paper, and of the released weights (one run), probed twice.
PUBLISHED = {
    (PAPER_NOISE, 0): ("64.55", "67.4"),
    (PAPER_NOISE, 30): ("83.05", "83.8"),
    (PAPER_NOISE, 50): ("-", "59.9"),
    ("none", 50): ("-", "91.1"),
}
Results = dict[tuple[str, int], list[float]]  # (noise, switch epoch) -> accuracies by seed


def sigma(noise: str) -> float:
    """Standard deviation of a Gaussian noise, of values in [0, 1]."""
    spec = NoiseSpec.parse(noise)
    assert isinstance(spec, Gauss), noise
    return spec.level / 255


def write_report(folder: Path, curriculum: tuple[int, int, int]) -> str:
    """Writes table.md, seeds.png and, of two noises or more, sweep.png of folder/results.jsonl; returns the table.

    curriculum: switch epochs of the noisy, the clean-then-noisy and the clean encoder.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display on a server
    rows = sorted(read_results(folder), key=lambda row: row["seed"])
    results: Results = {}
    for row in rows:
        results.setdefault((row["noise"], row["details"]["switch_epoch"]), []).append(row["value"])
    noises = sorted({noise for noise, _ in results} - {"none"}, key=sigma)
    text = seeds_table(results, curriculum, rows[0]["dataset"] == "mnist")
    plot_seeds(results, curriculum, folder / "seeds.png")
    if len(noises) > 1:
        text += "\n" + sweep_table(results, noises)
        plot_sweep(results, noises, curriculum[2], folder / "sweep.png")
    write_text(folder / "table.md", text)
    return text


def shown_encoders(results: Results, curriculum: tuple[int, int, int]) -> dict[str, tuple[str, int]]:
    """What the main table and plot show: label -> (noise, switch epoch), of those that have results."""
    noisy, switch, last = curriculum
    wanted = {
        f"noisy {last}, on noisy": (PAPER_NOISE, noisy),
        f"clean {switch} then noisy {last - switch}, on noisy": (PAPER_NOISE, switch),
        f"clean {last}, on noisy": (PAPER_NOISE, last),
        f"clean {last}, on clean": ("none", last),
    }
    return {label: key for label, key in wanted.items() if key in results}


def seeds_table(results: Results, curriculum: tuple[int, int, int], is_mnist: bool) -> str:
    """Markdown: mean, spread and range over the seeds, beside the published figures when the data are the same."""
    text = "| epochs | seeds | mean % | std | min | max | paper | released weights |\n|---" + "|---" * 7 + "|\n"
    for label, key in shown_encoders(results, curriculum).items():
        found = results[key]
        std = f"{statistics.stdev(found):.2f}" if len(found) > 1 else "-"
        known = PUBLISHED.get(key, ("-", "-")) if is_mnist and curriculum[2] == 50 else ("-", "-")
        mean, low, high = (f"{f(found):.2f}" for f in (statistics.mean, min, max))
        text += "| " + " | ".join((label, str(len(found)), mean, std, low, high, *known)) + " |\n"
    return text


def sweep_table(results: Results, noises: list[str]) -> str:
    """Markdown: mean accuracy on noisy digits for each standard deviation (lines) and switch epoch (columns)."""
    switches = sorted({switch for _, switch in results})
    text = "| noise std | " + " | ".join(f"switch {s}" for s in switches) + " |\n|---" + "|---" * len(switches) + "|\n"
    for noise in noises:
        cells = [results.get((noise, switch)) for switch in switches]
        means = [f"{statistics.mean(cell):.2f}" if cell else "-" for cell in cells]
        text += f"| {sigma(noise):.2g} | " + " | ".join(means) + " |\n"
    return text


def plot_seeds(results: Results, curriculum: tuple[int, int, int], path: Path) -> None:
    """The table as a picture: a dot per seed, a bar for their mean."""
    from matplotlib import pyplot as plt

    shown = shown_encoders(results, curriculum)
    figure, axes = plt.subplots(figsize=(6.5, 2.4), layout="constrained")
    for y, key in enumerate(shown.values()):
        axes.plot(results[key], [y] * len(results[key]), "o", alpha=0.6)
        axes.plot(statistics.mean(results[key]), y, "k|", markersize=22)
    axes.set(yticks=range(len(shown)), yticklabels=list(shown), xlabel="linear probe, top-1 % (dots: seeds, bar: mean)")
    axes.margins(y=0.15)
    axes.invert_yaxis()
    save(figure, path)


def plot_sweep(results: Results, noises: list[str], last: int, path: Path) -> None:
    """Left: accuracy over the epoch of the switch, a line per noise. Right: its gain over noisy digits only."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for i, noise in enumerate(noises):
        std = sigma(noise)
        means = {switch: statistics.mean(found) for (name, switch), found in sorted(results.items()) if name == noise}
        left.plot(list(means), list(means.values()), "o-", color=plt.cm.viridis(i / len(noises)), label=f"{std:.2g}")
        for switch in set(means) - {0} if 0 in means else ():
            colour = plt.cm.plasma(0.9 * switch / last)
            right.plot(std, means[switch] - means[0], "o", color=colour, label=f"{switch}")
    left.set(xlabel="epoch of the switch from clean to noisy", ylabel="linear probe on noisy, top-1 %")
    left.legend(title="noise std", fontsize=7)
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(xlabel="noise std", ylabel="gain over noisy alone, points")
    handles = dict(sorted(zip(*reversed(right.get_legend_handles_labels()), strict=True), key=lambda h: int(h[0])))
    right.legend(handles.values(), handles.keys(), title="switch epoch", fontsize=7)
    save(figure, path)


def save(figure, path: Path) -> None:
    """Writes a matplotlib figure as PNG, atomically, and closes it."""
    from matplotlib import pyplot as plt

    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)
