"""DINOv2 pretraining that is robust to noise. `dinov2.load_backbone(run)` gives a trained backbone."""

import utils  # noqa: F401 - how OpenMP waits, to be said before torch is loaded


def __getattr__(name: str):
    # On demand: `import dinov2` alone must not cost the import of torch.
    if name == "load_backbone":
        from dinov2.models.pretrained import load_backbone

        return load_backbone
    raise AttributeError(f"module 'dinov2' has no attribute {name!r}")
