"""Speed of noise against the algorithm of the published release, taken turn by turn in one run.

python -m tests.benchmark_noise --images FOLDER       (any photographs; they are brought to 500x375 px, JPEG)
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from utils import generate_noise
from utils.images import list_images, read_image
from utils.noise import ALL_NOISES, NoiseSpec, add_noise, keyed_noise, noise_key


def prepare(images: Path, source: Path, number: int) -> None:
    names = list_images(images)
    for i in range(number):
        picture = Image.fromarray(read_image(images / names[i % len(names)])).resize((500, 375))
        (source / "train" / "n0").mkdir(parents=True, exist_ok=True)
        picture.save(source / "train" / "n0" / f"x{i}.JPEG", quality=95)


def published(source: Path, target: Path, name: str) -> None:
    """The algorithm of the release: one process, one stream, Pillow's PNG with its default settings."""
    rng, spec = np.random.default_rng(42), NoiseSpec.parse(name)
    for relative in list_images(source):
        path = (target / relative).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(source / relative).convert("RGB") as image:
            Image.fromarray(add_noise(np.array(image), spec, rng)).save(path)


def size(root: Path) -> float:
    return sum(path.stat().st_size for path in root.rglob("*.png")) / 1e6


def seconds(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--number", type=int, default=24)
    parser.add_argument("--turns", type=int, default=2, help="of which the quicker counts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = root / "set"
        prepare(args.images, source, args.number)
        image = read_image(source / "train/n0/x0.JPEG")
        print("noise        adding ms: published  ours   writing img/s: published   ours  ratio   MB: published  ours")
        sums = np.zeros(2)
        for name in ALL_NOISES:
            spec = NoiseSpec.parse(name)
            adding = [
                min(seconds(add_noise, image, spec, np.random.default_rng(0)) for _ in range(3)),
                min(seconds(keyed_noise, image, spec, 0, noise_key("x")) for _ in range(9)),
            ]
            argv = ["--source", str(source), "--noise", name, "--output-root"]
            turns = [
                (seconds(published, source, root / "published" / name, name),
                 seconds(generate_noise.main, [*argv, str(root / f"ours{turn}")]))
                for turn in range(args.turns)
            ]  # fmt: skip
            theirs, ours = map(min, zip(*turns, strict=True))
            sums += theirs, ours
            sizes = size(root / "published" / name), size(root / "ours0" / f"noisy_set-{name}")
            print(f"{name:12s} {adding[0] * 1e3:20.1f} {adding[1] * 1e3:5.1f} {args.number / theirs:26.1f} "
                  f"{args.number / ours:6.1f} {theirs / ours:6.1f} {sizes[0]:15.1f} {sizes[1]:5.1f}")  # fmt: skip
        together = min(
            seconds(generate_noise.main, ["--source", str(source), "--output-root", str(root / f"all{turn}")])
            for turn in range(args.turns)
        )
        print(f"all nine: published {9 * args.number / sums[0]:.1f} img/s, ours in one call "
              f"{9 * args.number / together:.1f} img/s, ratio {sums[0] / together:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
