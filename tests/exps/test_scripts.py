"""The shell scripts: they parse in bash and dash, print what they would run, and run each command once."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dinov2.config import load_config
from dinov2.run import stages
from dinov2.run.options import Options, finish
from utils.locks import process_tag
from utils.results import append_result

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path for folder in ("exps", "tests", "Neighbor2Neighbor", "toy_mnist") for path in (ROOT / folder).rglob("*.sh")
)
ALL_NOISES = "gauss50 gauss100 gauss255 speckle0.4 speckle0.7 speckle1.0 shot10 shot3 shot1".split()
EVALUATIONS = ["dinov2.eval.linear", "dinov2.eval.knn", "dinov2.eval.pca"]
SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)]


def run(*command, cwd=ROOT):
    """The finished process, with the tests' own Python first on the path, as in an active environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": ""}
    command = [str(part) for part in command]
    return subprocess.run(command, check=False, cwd=cwd, env=environment, capture_output=True, text=True)


def commands(*command, **options):
    """The commands that a --dry-run prints, each as a list without its Python."""
    done = run(*command, "--dry-run", **options)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line)[2:] for line in done.stdout.splitlines() if line.startswith("+ ")]


def value(command, key):
    """What a command gives as key=value or --key value."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word.startswith(f"{key}="):
            return word.partition("=")[2]
        if word == f"--{key}":
            return following
    raise AssertionError(f"no {key} in {command}")


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci/run"], ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_parse(script):
    shells = ["bash"] if "bash" in script.read_text().splitlines()[0] else SHELLS
    for shell in shells:
        done = run(shell, "-n", script)
        assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_quickstart_runs_all_stages(shell):
    listed = commands(shell, "exps/quickstart.sh", "--output", "runs/no-such-run")
    modules = [command[1] if command[0] == "-m" else command[0] for command in listed]
    assert modules == (
        ["exps/make_digits.py", "utils/generate_noise.py", "Neighbor2Neighbor.train", "Neighbor2Neighbor.denoise"]
        + ["process_metadata.py"]
        + 5 * ["dinov2.train"]
        + 5 * EVALUATIONS
        + 3 * ["dinov2.eval.floors"]
        + ["utils.report"]
    )
    trained = [command for command in listed if command[1:2] == ["dinov2.train"]]
    assert [command[3] for command in trained] == ["dinov2", "n2n", "nc", "nct", "clean"]
    # One denoised run serves three of them.
    n2n = value(trained[1], "output_dir")
    assert [value(command, "curriculum.denoised_dir") for command in trained[1:4]] == [n2n, n2n, n2n]
    denoised = value(listed[3], "output")
    assert {value(command, "data.denoised_root") for command in trained[:4]} == {denoised}
    assert value(listed[3], "model") == value(listed[2], "output") + "/unet.pth"


@pytest.mark.parametrize("shell", SHELLS)
def test_each_seed_has_runs_of_its_own_and_shares_the_denoised_copies(shell):
    listed = commands(shell, "exps/quickstart.sh", "--output", "runs/o", "--seed", 0, "--seed", 2, "--method", "nct")
    trained = [command for command in listed if command[1:2] == ["dinov2.train"]]
    assert [value(command, "seed") for command in trained] == ["0", "2"]
    assert [value(command, "output_dir") for command in trained] == ["runs/o/gauss100/nct", "runs/o/gauss100/nct-seed2"]
    assert value(trained[1], "curriculum.denoised_dir") == "runs/o/gauss100/n2n-seed2"
    modules = [command[1] for command in listed]
    assert modules.count("Neighbor2Neighbor.train") == 1 and modules.count("dinov2.eval.floors") == 1
    assert modules.count("dinov2.eval.knn") == 2
    assert run(shell, "exps/quickstart.sh", "--seed", "one", "--dry-run").returncode == 2


def test_the_miniature_trains_all_methods_and_seeds():
    listed = commands("sh", "exps/miniature.sh", "--data", "runs/no-such-data")
    trained = [command for command in listed if command[1:2] == ["dinov2.train"]]
    runs = [(command[3], value(command, "output_dir"), value(command, "seed")) for command in trained]
    assert len(runs) == 20 and len(set(runs)) == 19  # the clean oracle of seed 0 serves both noises
    assert [method for method, *_ in runs[:5]] == ["dinov2", "n2n", "nc", "nct", "clean"]
    assert {value(command, "data.root") for command in trained} == {"runs/no-such-data"}


@pytest.mark.parametrize("shell", SHELLS)
def test_floors_are_made_once_for_each_noise_and_view(shell):
    options = ["gauss50", "shot3", "--output", "runs/o", "--floor", "w.pth", "eval.knn.k=[5]", "--eval", "knn"]
    listed = [c[2:] for c in commands(shell, "exps/6_evaluate.sh", *options) if c[1] == "dinov2.eval.floors"]
    folders = ["gauss50/dinov2", "gauss50/n2n", "shot3/dinov2", "shot3/n2n", "clean"]
    assert [value(command, "run") for command in listed] == [f"runs/o/{folder}" for folder in folders]
    for command in listed:
        assert command[1:] == ["output=runs/o", "evaluators=knn", "weights=w.pth", "eval.knn.k=[5]"]
    assert "floors" not in str(commands(shell, "exps/6_evaluate.sh", "--eval", "pca"))


def test_own_data_other_scale_and_a_noise_without_lambda(tmp_path):
    data = tmp_path / "my data"
    (data / "train").mkdir(parents=True)
    options = ["--data", "my data", "--noise", "shot3", "--scale", "imagenet100"]
    refused = run("sh", ROOT / "exps/quickstart.sh", *options, "--dry-run", cwd=tmp_path)
    assert refused.returncode == 2 and "give anchor.weights.shot3=NUMBER, or leave nct out: --method" in refused.stderr
    options += [word for method in ("dinov2", "n2n", "nc", "clean") for word in ("--method", method)]
    listed = commands("sh", ROOT / "exps/quickstart.sh", *options, cwd=tmp_path)
    trained = [command for command in listed if command[1:2] == ["dinov2.train"]]
    assert [command[2:4] for command in trained] == [["imagenet100", m] for m in ("dinov2", "n2n", "nc", "clean")]
    assert {value(command, "data.root") for command in trained} == {str(data)}
    assert value(trained[0], "output_dir") == "runs/my data/shot3/dinov2"
    assert value(trained[0], "data.denoised_root") == str(tmp_path / "noisy_my data-shot3-denoised")
    # No tree of noisy images at this scale: the noise is added while loading.
    assert not [command for command in listed if "generate_noise" in command[0]]
    listed = commands("sh", "exps/5_pretrain.sh", "shot3", "--scale", "imagenet100", "anchor.weights.shot3=3")
    assert "nct" in [command[3] for command in listed]


@pytest.mark.parametrize("scale", ["quickstart", "imagenette", "imagenet100", "imagenet1k"])
def test_images_that_are_noisy_by_nature_have_a_lambda_at_every_scale(scale):
    listed = commands("sh", "exps/5_pretrain.sh", "none", "--scale", scale, "--method", "nct")
    cfg = load_config(listed[-1][2:])
    assert cfg.anchor.weights["none"] == 2.0


def test_natural_noise_adds_none_and_has_no_oracle():
    listed = commands("sh", "exps/quickstart.sh", "--data", "sar", "--noise", "none")
    trained = [command for command in listed if command[1:2] == ["dinov2.train"]]
    assert [command[3] for command in trained] == ["dinov2", "n2n", "nc", "nct"]
    assert {value(command, "data.denoised_root") for command in trained} == {"sar-denoised"}
    assert not [command for command in listed if "generate_noise" in command[0]]


@pytest.mark.parametrize("shell", SHELLS)
def test_images_of_other_channels(shell):
    """--channels reaches the denoiser, the copies and the runs; 3 is for deep colour images and needs no mean."""
    numbers = ["data.mean=[0.1,0.1,0.1,0.1,0.1]", "data.std=[0.2,0.2,0.2,0.2,0.2]"]
    for options in (["--channels", "5", *numbers], [*numbers[::-1], "--channels", "5"], ["--channels", "3"]):
        listed = commands(shell, "exps/quickstart.sh", "--data", "cells", *options)
        channels = options[options.index("--channels") + 1]
        for command in listed:
            if command[1:2] == ["dinov2.train"]:
                assert value(command, "data.in_chans") == channels
                assert channels == "3" or value(command, "data.mean") == "[0.1,0.1,0.1,0.1,0.1]"
            if "generate_noise" in command[0] or command[1:2] == ["Neighbor2Neighbor.train"]:
                assert value(command, "channels") == channels
            if "generate_noise" in command[0] or command[1:2] == ["Neighbor2Neighbor.denoise"]:
                assert value(command, "format") == "npy"


@pytest.mark.parametrize("shell", SHELLS)
def test_published_commands_cover_the_paper(shell):
    listed = commands(shell, "exps/linear_probe.sh")
    trained = [command[2:4] + [value(command, "noise")] for command in listed if command[1] == "dinov2.train"]
    assert sorted(trained) == sorted(["imagenet100", m, n] for m in ("dinov2", "n2n", "nc") for n in ALL_NOISES)
    probed = [value(command, "run") for command in listed if command[1] == "dinov2.eval.linear"]
    assert len(probed) == 27 and {value(c, "checkpoints") for c in listed if c[1].endswith("linear")} == {"all"}
    floors = [command for command in listed if command[1] == "dinov2.eval.floors"]  # noisy, denoised: 9 noises
    assert len(floors) == 18 and {value(command, "evaluators") for command in floors} == {"linear"}
    listed = commands(shell, "exps/linear_probe_nct.sh")
    trained = [(command[3], value(command, "noise")) for command in listed if command[1] == "dinov2.train"]
    assert trained == [("nct", noise) for noise in ("gauss255", "gauss100", "shot1", "speckle1.0")]


def test_denoised_trees_are_found_where_the_published_steps_move_them(tmp_path, monkeypatch):
    """A tree left in Neighbor2Neighbor/ (the second mv left out) is used from there."""
    (tmp_path / "Neighbor2Neighbor/noisy_mini-imagenet-shot1-denoised").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    options = Options(scale="imagenet100", methods=["n2n"], noises=["shot1", "shot3"])
    finish(options)
    first, second = (step.command for step in stages.pretrain(options))
    assert value(first, "data.denoised_root") == "Neighbor2Neighbor/noisy_mini-imagenet-shot1-denoised"
    assert value(second, "data.denoised_root") == "noisy_mini-imagenet-shot3-denoised"


def test_trial_cuts_every_schedule():
    options = ["--data", "d", "--scale", "imagenet1k", "--steps", "21", "--per-class", "4"]
    listed = commands("sh", "exps/quickstart.sh", *options)
    assert listed[0][0] == "exps/subset.py" and value(listed[0], "per-class") == "4"
    trained = [command for command in listed if command[1:2] == ["dinov2.train"]]
    for command in trained:
        assert value(command, "trial") == "true"
        assert int(value(command, "train.epochs")) * int(value(command, "train.epoch_length")) == 22
    cfg = load_config(trained[3][2:])
    assert [stage.epochs for stage in cfg.curriculum.stages] == [2, 1] and cfg.anchor.epoch == 1


def test_imagenet1k_jobs_wait_for_what_they_need():
    listed = commands("sh", "exps/imagenet1k/submit.sh", "--partition", "P", "gauss100")
    after = {value(c, "name"): value(c, "dependency") if "--dependency" in c else "" for c in listed}
    assert after == {
        "denoiser-gauss100": "",
        "denoise-gauss100": "afterok:<denoiser-gauss100>",
        "dinov2-gauss100": "",
        "n2n-gauss100": "afterok:<denoise-gauss100>",
        "nc-gauss100": "afterok:<denoise-gauss100>:<n2n-gauss100>",
        "nct-gauss100": "afterok:<denoise-gauss100>:<n2n-gauss100>",
        **{f"linear-{m}-gauss100": f"afterok:<{m}-gauss100>" for m in ("dinov2", "n2n", "nc", "nct")},
        "floors-noisy-gauss100": "afterok:<dinov2-gauss100>",
        "floors-denoised-gauss100": "afterok:<n2n-gauss100>",
    }
    assert len(commands("sh", "exps/imagenet1k/submit.sh")) == 24


def test_imagenet1k_jobs_for_other_channels():
    deep = commands("sh", "exps/imagenet1k/submit.sh", "--channels", "3", "gauss100")
    jobs = {value(command, "name"): command[command.index("--") + 1 :] for command in deep}
    assert value(jobs["denoiser-gauss100"], "channels") == "3" and value(jobs["denoise-gauss100"], "format") == "npy"
    assert value(jobs["nct-gauss100"], "data.in_chans") == "3"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--scale", "imagenet1000"], "no scale imagenet1000"),
        (["--nosie", "gauss50"], "unknown option --nosie: did you mean --noise?"),
        (["--method", "nctt"], "--method nctt is none of dinov2, n2n, nc, nct, clean: did you mean nct?"),
        (["--eval", "kNN"], "--eval kNN is none of"),
        (["gaus50"], "gaus50"),
        (["--sides", "64"], "--sides: takes two whole numbers such as 64,256, not 64"),
        (["--data"], "--data needs a value"),
        (["--steps", "many"], "not many"),
        (["--gpus", "0"], "not 0"),
        (["--floor"], "--floor needs a value"),
        (["--channels", "five"], "not five"),
        (["--channels", "5"], "--channels 5 needs data.mean=[...] and data.std=[...], 5 numbers each"),
        (["--channels", "1", "data.mean=[0.5]"], "data.std"),
    ],
)
def test_wrong_options_are_refused(arguments, message):
    done = run("sh", "exps/5_pretrain.sh", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error:") and message in done.stderr


def test_help_shows_the_options_and_the_defaults_of_the_script():
    done = run("sh", "exps/6_evaluate.sh", "--help")
    assert done.returncode == 0
    assert "Stage 6" in done.stdout and "--checkpoints" in done.stdout and "[last]" in done.stdout
    text = run("sh", "exps/linear_probe_nct.sh", "--help").stdout
    assert "[gauss255 gauss100 shot1 speckle1.0]" in text and "[nct]" in text and "[imagenet100]" in text
    assert "[all]" in text and "root=" not in text


@pytest.mark.parametrize("shell", SHELLS)
def test_arguments_are_printed_as_a_shell_reads_them_and_never_run(shell, tmp_path):
    hostile = f'it\'s $(touch {tmp_path}/run) `touch {tmp_path}/run`; "y" *'
    listed = commands(shell, "exps/5_pretrain.sh", "--method", "dinov2", f"data.name={hostile}")
    assert value(listed[-1], "data.name") == hostile
    assert list(tmp_path.iterdir()) == []


def test_chips_are_cut_and_what_a_kill_left_is_swept(tmp_path):
    (tmp_path / "source/test/a").mkdir(parents=True)
    Image.new("L", (9, 8)).save(tmp_path / "source/test/a/x.jpg")
    left = tmp_path / "out" / f".chips.tmp-{process_tag().partition('-')[0]}-{2**22 + 1}"
    left.mkdir(parents=True)
    command = ["exps/crop_chips.py", "--source", tmp_path / "source", "--size", 6, "--output", tmp_path / "out/chips"]
    done = run(sys.executable, *command)
    assert done.returncode == 0, done.stderr
    assert not left.exists() and Image.open(tmp_path / "out/chips/val/a/x.png").size == (6, 6)


def test_digits_are_split_by_class_and_written_once(tmp_path):
    command = [sys.executable, "exps/make_digits.py", "--output", tmp_path / "digits"]
    assert run(*command).returncode == 0
    count = {
        split: sorted(len(list(folder.iterdir())) for folder in (tmp_path / "digits" / split).iterdir())
        for split in ("train", "val")
    }
    assert sum(count["train"]) == 1442 and sum(count["val"]) == 355
    assert min(count["train"]) >= 139 and min(count["val"]) >= 34
    assert "left as it is" in run(*command).stdout
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_subset_links_the_first_images(tmp_path):
    assert run(sys.executable, "exps/make_digits.py", "--output", tmp_path / "digits").returncode == 0
    cut = tmp_path / "cut"
    done = run(sys.executable, "exps/subset.py", "--source", tmp_path / "digits", "--per-class", 3, "--output", cut)
    assert done.returncode == 0, done.stderr
    names = sorted(path.relative_to(cut) for path in cut.glob("*/*/*.png"))
    assert len(names) == 2 * 10 * 3
    assert all((tmp_path / "digits" / name).read_bytes() == (cut / name).read_bytes() for name in names)
    missing = run(sys.executable, "exps/subset.py", "--source", tmp_path / "no", "--per-class", 3, "--output", "x")
    assert missing.returncode == 2 and missing.stderr.startswith("error:")


def write_run(folder, rows, method="x"):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"method: {method}\n")
    given = {"method": method, "noise": "gauss50", "dataset": "x", "seed": 0, "view": "noisy", "protocol": "exact"}
    for metric, epoch, value in rows:
        row = given | {"iteration": epoch, "epoch": epoch, "metric": metric, "value": value}
        append_result(folder / "results.jsonl", row)


def test_instance_recognition_script_takes_best_and_final(tmp_path):
    probes = [("linear_top1", 5, 40.0), ("linear_top1", 10, 60.0), ("robustness_linear_top1", 5, 99.0)]
    write_run(tmp_path / "runs/gauss50/dinov2", [*probes, ("linear_top1", 15, 55.0)])
    write_run(tmp_path / "runs/gauss50/nc", probes)
    write_run(tmp_path / "runs/gauss50/n2n", [])
    write_run(tmp_path / "runs/floors/gauss50-noisy/pixels", [("linear_top1", 0, 20.0)], "pixels")
    generator = ROOT / "exps/generate_instance_recog_script.py"
    done = run(sys.executable, generator, "runs", "--data", "oxford", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in (tmp_path / "instance_recog.sh").read_text().splitlines() if "eval" in line]
    chosen = [(Path(value(line, "run")).name, value(line, "checkpoints")) for line in lines]
    assert chosen == [("dinov2", "10"), ("dinov2", "last"), ("n2n", "last"), ("nc", "10")]
    assert {value(line, "eval.retrieval.root") for line in lines} == {str(tmp_path / "oxford")}
    assert run("sh", "-n", tmp_path / "instance_recog.sh").returncode == 0
    ended = run("sh", "instance_recog.sh", cwd=tmp_path)
    assert ended.returncode == 2 and "error:" in ended.stderr  # the runs have no checkpoints: the first command says so
    nothing = run(sys.executable, generator, tmp_path / "none")
    assert nothing.returncode == 2 and "no runs in" in nothing.stderr


def test_environment_must_satisfy_the_requirements(tmp_path):
    def satisfied(text):
        (tmp_path / "requirements.txt").write_text(text)
        body = f'. exps/env.sh; satisfies python "{tmp_path}/requirements.txt" && echo yes'
        return "yes" in run("dash", "-c", body).stdout

    assert satisfied("torch>=2.1  # reason\n\nnumpy\n")
    assert not satisfied("torch>=99\n")
    assert not satisfied("numpy\nno-such-package\n")


def test_the_limit_of_pixels_reaches_every_stage():
    listed = commands("bash", "exps/quickstart.sh", "--max-pixels", "99000000", "--output", "runs/no-such-run")
    for module in ("Neighbor2Neighbor.train", "Neighbor2Neighbor.denoise"):
        (command,) = [command for command in listed if module in command]
        assert value(command, "max-pixels") == "99000000"
    trained = [command for command in listed if "dinov2.train" in command]
    assert trained and all(value(command, "data.max_pixels") == "99000000" for command in trained)


@pytest.mark.parametrize("shell", SHELLS)
def test_folders_are_taken_to_the_letter(shell):
    for folder in ("/x/a #b", "/x/${oc.env:HOME}", "007", "1e3", "/x/a: b\\", "/x/it's", "-x", "/x/$HOME `id`"):
        arguments = ("--method", "n2n", "--data", folder, "--output", f"{folder}/o")
        (command,) = commands(shell, "exps/5_pretrain.sh", *arguments)
        cfg = load_config(command[2:])
        expected = "./-x" if folder == "-x" else folder
        assert (cfg.data.root, cfg.output_dir) == (expected, f"{expected}/o/gauss100/n2n")
        (command,) = commands(shell, "exps/3_denoise.sh", *arguments)
        assert value(command, "data") == expected
        assert value(command, "model") == f"{expected}/o/gauss100/denoiser/unet.pth"
