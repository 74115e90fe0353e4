"""The report over any set of runs: a table for the terminal, and one self-contained HTML page of all there is to see.

    python -m utils.report runs/imagenet100 [--output report.html] [--title "..."] [--denoiser runs/n2n-gauss255]

Runs are folders that dinov2.train and dinov2.eval wrote (config.yaml, metrics.jsonl, results.jsonl, pca.npz,
retrieval/, map.json), or folders that hold such folders; floors/ and denoiser/ beside them are found. The page has no
script and asks nothing of a network; it reads in light, dark and on a phone.
"""
