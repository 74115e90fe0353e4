"""The toy: a two-layer encoder on noisy MNIST, and the curriculum from clean to noisy digits. See toy_exp.md."""

import utils  # noqa: F401 - how OpenMP waits, to be said before torch is loaded
