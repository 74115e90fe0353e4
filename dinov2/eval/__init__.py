"""What a frozen backbone is worth, one file per evaluator."""

EVALUATORS = {  # name of the file, and of the scripts' --eval: whether it needs labels in train and val
    "linear": True, "knn": True, "log_regression": True, "robustness": True,
    "pca": False, "label_free": False, "map": False,
}  # fmt: skip
FLOORED = ("linear", "knn")  # those that floors are made for
