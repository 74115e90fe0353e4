"""Who may import whom, read from the source: the rooms of docs/architecture.md stay apart."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    "README.md", "dinov2", "Neighbor2Neighbor", "toy_mnist", "utils", "exps", "process_metadata.py", "requirements.txt",
    "setup.py", "tests", "docs", "LICENSE",
}  # fmt: skip
# What users bring or the tools write, all of it ignored by git.
BROUGHT = ("mini-imagenet", "noisy_", "imagenet", "datasets", "runs", "build", "dist", "instance_recog.sh")
PACKAGES = ("utils", "Neighbor2Neighbor", "toy_mnist", "dinov2")
# Module prefix → prefixes within the project that it may import, besides itself. The longest matching prefix counts.
MAY_IMPORT = {
    "utils": (),
    "Neighbor2Neighbor": ("utils",),
    "toy_mnist": ("utils",),
    "dinov2.layers": ("utils.distributed",),  # batch normalisation over all ranks
    "dinov2.loss": ("utils.distributed", "utils.fused"),
    "dinov2.models": ("dinov2.layers", "dinov2.config", "dinov2.checkpoint", "utils"),
    "dinov2.data": ("utils",),
    "dinov2.objectives": ("dinov2.layers", "dinov2.models", "dinov2.loss", "utils.distributed", "utils.memory",
                          "utils.spectrum"),
    "dinov2.train": ("dinov2.layers", "dinov2.models", "dinov2.loss", "dinov2.objectives", "dinov2.data", "utils",
                     "dinov2.config", "dinov2.checkpoint"),
    "dinov2.train.__main__": ("dinov2", "utils"),  # wires the live kNN figure: train and eval know no other
    "dinov2.eval": ("dinov2.layers", "dinov2.models", "dinov2.data", "utils", "dinov2.config",
                    "dinov2.keys", "dinov2.checkpoint"),
    "dinov2.config": ("dinov2.keys", "utils"),
    "dinov2.run": ("dinov2.config", "dinov2.data", "dinov2.eval.EVALUATORS", "dinov2.eval.FLOORED", "utils",
                   "dinov2.train.curriculum.check_objective",
                   "dinov2.models.weights.read_model_keys"),  # else it starts trainings as commands
    "dinov2": ("dinov2", "utils"),
    "exps": ("utils", "dinov2", "Neighbor2Neighbor", "toy_mnist"),
    "process_metadata": ("dinov2.data", "utils"),
}  # fmt: skip
FORBIDDEN = ("xformers", "fvcore", "iopath", "lightning", "pytorch_lightning", "torchmetrics")


def sources():
    """Module name → parsed source, of all product Python."""
    files = [ROOT / "process_metadata.py"]
    for package in (*PACKAGES, "exps"):
        files += sorted((ROOT / package).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text()) for file in files}


SOURCES = sources()


def imported(module, tree):
    """Absolute names that a module imports, wherever in it; `from a import b` gives a.b."""
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def within(name, prefix):
    return name == prefix or name.startswith(f"{prefix}.")


def rule_of(module):
    return max((prefix for prefix in MAY_IMPORT if within(module, prefix)), key=len)


def breaches(sources):
    """`module imports name` for everything that the rules forbid."""
    for module, tree in sources.items():
        rule = rule_of(module)
        allowed = (*MAY_IMPORT[rule], rule if rule != "dinov2.train.__main__" else "dinov2")
        for name in imported(module, tree):
            if name.split(".")[0] in (*PACKAGES, "exps", "process_metadata"):
                if not any(within(name, prefix) for prefix in allowed):
                    yield f"{module} imports {name}"
            elif name.split(".")[0] in FORBIDDEN:
                yield f"{module} imports {name}"


def test_rooms_import_only_what_they_may():
    assert sorted(breaches(SOURCES)) == []


@pytest.mark.parametrize(
    "module, line",
    [
        ("utils.noise", "import dinov2.config"),
        ("dinov2.data.loader", "from dinov2.models import vision_transformer"),
        ("dinov2.data.loader", "from ..models import vision_transformer"),
        ("dinov2.data.loader", "def f():\n    import dinov2.eval.knn"),
        ("dinov2.eval.knn", "from dinov2.train.trainer import Trainer"),
        ("dinov2.train.trainer", "from dinov2 import eval"),
        ("dinov2.loss.koleo", "from dinov2.layers.block import Block"),
        ("dinov2.objectives.dinov2", "from dinov2.train.anchor import Anchored"),
        ("toy_mnist.model", "from Neighbor2Neighbor.unet import UNet"),
        ("dinov2.layers.attention", "from xformers.ops import memory_efficient_attention"),
    ],
)
def test_the_rules_see_a_breach(module, line):
    assert len(list(breaches({module: ast.parse(line)}))) == 1


def calls(tree, name):
    """Calls of `name` ("torch.load") in a source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
            yield node


def test_every_torch_load_is_weights_only():
    for module, tree in SOURCES.items():
        for call in calls(tree, "torch.load"):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert keywords.get("weights_only") == "True", f"{module}:{call.lineno}"


def test_nothing_unpickles_or_runs_a_shell():
    for module, tree in SOURCES.items():
        for name in ("pickle.load", "pickle.loads", "os.system", "eval", "exec"):
            assert not list(calls(tree, name)), f"{module} calls {name}"
        for node in ast.walk(tree):
            shell = isinstance(node, ast.keyword) and node.arg == "shell"
            assert not shell or ast.unparse(node.value) == "False", f"{module} runs a shell"


def test_what_is_renamed_is_renamed_by_atomic_path():
    """Apart from checkpoints, which are written by several ranks, and the mark of a tree that is taken back."""
    found = {m for m, tree in SOURCES.items() for name in ("os.replace", "os.rename") for _ in calls(tree, name)}
    assert found <= {"utils.files", "utils.images", "dinov2.checkpoint", "dinov2.config"}


def test_only_distributed_reads_the_launch_environment():
    """Apart from the job wrapper on Slurm, which is a launcher."""
    for module, tree in SOURCES.items():
        if module not in ("utils.distributed", "dinov2.run.task"):
            names = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
            assert not names & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS"}, module


def test_top_level_is_fixed():
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith((".", "__pycache__"))}
    unknown = {name for name in found - TOP_LEVEL if not name.startswith(BROUGHT) and not name.endswith(".egg-info")}
    assert unknown == set()
    assert TOP_LEVEL - found == set()


def test_loop_and_objectives_know_no_curriculum():
    """Any objective is trained by any curriculum: neither has the other's words."""
    loop = ("trainer", "batches", "loss_monitor", "placement", "optim")
    files = [ROOT / f"dinov2/train/{name}.py" for name in loop]
    files += (ROOT / "dinov2/objectives").glob("*.py")
    for file in files:
        source = file.read_text().lower()
        for word in ("anchor", "denoised", "curriculum"):
            assert word not in source, f"{file.name} says {word}"
