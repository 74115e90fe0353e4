"""Installs the packages of this folder: pip install -e ."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """Those of a file of this folder, without comments; none where it is not shipped."""
    path = HERE / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in (line.partition("#")[0].strip() for line in lines) if line]


setup(
    name="noise-robust-dino",
    version=re.search(r'^VERSION = "(.*)"', (HERE / "utils/results.py").read_text(), re.MULTILINE).group(1),
    description="DINOv2 pretraining on noisy images: a noise curriculum instead of a denoiser at inference",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dinov2*", "Neighbor2Neighbor*", "toy_mnist*", "utils*"]),
    package_data={
        "dinov2": ["configs/*.yaml", "configs/objectives/*.yaml"],
        "Neighbor2Neighbor": ["*.sh", "*.yaml"],
        "toy_mnist": ["*.sh"],
        "utils.report": ["*.html", "*.css", "*.yaml"],
    },
    py_modules=["process_metadata"],
    entry_points={"console_scripts": ["noise-robust-dino = dinov2.__main__:main"]},
    install_requires=requirements("requirements.txt"),
    extras_require={
        "tests": requirements("tests/requirements.txt"),
        "dicom": ["pydicom>=3.0.2"],
        "fits": ["astropy>=8.0"],
        "nifti": ["nibabel>=5.4"],
        "zarr": ["zarr>=3.0"],
        "microscopy": ["nd2>=0.10", "czifile>=2019.7.2", "readlif>=0.6.5"],
        "umap": ["umap-learn>=0.5.7"],
        "parquet": ["pyarrow>=17"],
        "onnx": ["onnx>=1.17", "onnxscript>=0.2"],
    },
)
