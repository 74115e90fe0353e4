"""Image folders to augmented crops: index -> decode -> noise -> padded canvas (worker) -> crops (training device)."""
