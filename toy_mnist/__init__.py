"""The toy: a two-layer encoder on noisy MNIST, and the curriculum from clean to noisy digits. See toy_exp.md."""
