"""Speed of denoising a tree against the way of the published release, with the same weights, turn by turn in one run.

    python -m tests.benchmark_denoiser --model DIR/unet.pth --images FOLDER --noise gauss25
(any photographs; they are brought to 500x375 px and noise is written to disk, from which both read)
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from Neighbor2Neighbor import denoise
from Neighbor2Neighbor.unet import load_unet
from tests.benchmark_noise import prepare, seconds
from utils import generate_noise
from utils.images import list_images, read_image


class Squares(torch.utils.data.Dataset):
    """Images as the release reads them: padded by reflection to a square whose side is a multiple of 32."""

    def __init__(self, root: Path):
        self.root, self.relatives = root, list_images(root)

    def __len__(self) -> int:
        return len(self.relatives)

    def __getitem__(self, index: int):
        image = np.asarray(Image.open(self.root / self.relatives[index]).convert("RGB"), np.float32) / 255
        height, width = image.shape[:2]
        side = (max(height, width) + 31) // 32 * 32
        padded = np.pad(image, ((0, side - height), (0, side - width), (0, 0)), "reflect")
        return torch.from_numpy(padded.transpose(2, 0, 1).copy()), height, width, self.relatives[index]


@torch.no_grad()
def published(model: Path, root: Path, target: Path) -> None:
    """One image at a time through the network in float32; PNG with Pillow's defaults in the same process."""
    network = load_unet(model)
    if torch.cuda.is_available():
        network = network.cuda()
    for batch, height, width, (relative,) in DataLoader(Squares(root), batch_size=1, num_workers=2):
        output = network(batch.to(next(network.parameters()).device))[0, :, : int(height), : int(width)]
        array = output.clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        path = target / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(array * 255 + 0.5, 0, 255).astype(np.uint8)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--noise", default="gauss25")
    parser.add_argument("--number", type=int, default=24)
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(args.images, root / "set", args.number)
        generate_noise.main(["--source", str(root / "set"), "--noise", args.noise])
        noisy = root / f"noisy_set-{args.noise}"
        times: dict[str, list[float]] = {"published": [], "fp32": [], "bf16": []}
        for turn in range(args.turns):
            times["published"].append(seconds(published, args.model, noisy, root / f"published{turn}"))
            for precision in ("fp32", "bf16"):
                argv = ["--model", str(args.model), "--data", str(noisy), "--noise", "none", "--precision", precision,
                        "--output", str(root / f"{precision}{turn}")]  # fmt: skip
                times[precision].append(seconds(denoise.main, argv))
        for name, taken in times.items():
            worst, share = compare(root / "published0", root / f"{name}0")
            speed, ratio = args.number / min(taken), min(times["published"]) / min(taken)
            print(f"{name:10s} {speed:6.2f} img/s, ratio {ratio:5.2f}; against published at most {worst}/255, "
                  f"{share:.1e} of the values off by more than 1/255")  # fmt: skip


def compare(one: Path, two: Path) -> tuple[int, float]:
    """Largest difference of two trees of the same images, and the share of the values that differ by more than 1."""
    differences = [
        np.abs(read_image(one / relative).astype(int) - read_image(two / relative)) for relative in list_images(one)
    ]
    return max(d.max() for d in differences), float(np.mean([(d > 1).mean() for d in differences]))


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s")
