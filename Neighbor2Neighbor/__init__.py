"""Neighbor2Neighbor (Huang et al., CVPR 2021): a denoiser trained on single noisy images, and its pass over a tree."""

import utils  # noqa: F401 - how OpenMP waits, to be said before torch is loaded
