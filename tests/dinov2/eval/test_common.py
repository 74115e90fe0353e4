"""The one command line of the evaluators: choice of checkpoints, settings, skipping, and errors of the user."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from dinov2 import checkpoint, load_backbone
from dinov2.config import load_run_config
from dinov2.eval import common, instance_recog, knn, linear
from tests.conftest import ROOT
from tests.dinov2.eval.conftest import make_run, save_weights, write_digits
from utils.results import append_result, read_results


def evaluate(run, *arguments):
    return common.run("knn", knn.evaluate, "", lambda cfg: [cfg], [f"run={run}", *arguments])


def test_rows_say_what_they_are_and_are_made_once(run, capsys):
    assert evaluate(run, "checkpoints=all") == 0
    rows = read_results(run)
    assert [(row["epoch"], row["metric"]) for row in rows] == [(e, f"knn{k}_top1") for e in (1, 2) for k in (3, 10)]
    for row in rows:
        assert (row["method"], row["noise"], row["dataset"], row["seed"]) == ("dinov2", "gauss50", "digits", 0)
        assert (row["objective"], row["curriculum"]) == ("dinov2", "none")
        assert row["iteration"] == 10 * row["epoch"] and row["config_hash"] and row["version"]
    assert [row["details"].get("last", False) for row in rows] == [False, True, False, True]
    evaluate(run, "checkpoints=all")
    assert "2 of 2 evaluations are there already" in capsys.readouterr().out
    assert len(read_results(run)) == 4
    evaluate(run, "checkpoints=last", "eval.knn.k=[5]")  # other settings: other rows
    assert [row["metric"] for row in read_results(run)[4:]] == ["knn5_top1"]
    evaluate(run, "checkpoints=last", "eval.linear.epochs=99", "data.workers=1")  # not this evaluator's: nothing to do
    assert len(read_results(run)) == 5


def test_other_images_weights_and_noise_make_new_rows(run, digits, tmp_path, capsys):
    """The same images elsewhere do not; one that was replaced since does."""
    checkpoint.save(run, {"x": torch.zeros(1)}, 20, 2, teacher_of(run), 1, identity="abc")
    evaluate(run)
    assert [row["details"]["identity"] for row in read_results(run)] == ["abc", "abc"]
    moved = shutil.copytree(digits, tmp_path / "elsewhere" / digits.name)
    evaluate(run, f"data.root={moved}")
    assert "1 of 1 evaluations are there already" in capsys.readouterr().out
    common._digest_images.cache_clear()  # as in the next call of the program
    first = sorted((moved / "val").rglob("*.png"))[0]
    first.write_bytes(first.read_bytes() + b"\0")
    for more in ([], ["data.noise_seed=1"], ["noise=gauss100"], ["eval.view=clean"]):
        before = len(read_results(run))
        evaluate(run, f"data.root={moved}", *more)
        assert len(read_results(run)) == before + 2, more
    checkpoint.save(run, {"x": torch.zeros(1)}, 20, 2, teacher_of(run), 1, identity="other")
    evaluate(run)
    assert [row["details"]["identity"] for row in read_results(run)[-2:]] == ["other", "other"]


def test_labels_that_were_corrected_are_other_settings(tmp_path, digits):
    data = shutil.copytree(digits / "train", tmp_path / "all")
    names = sorted(str(path.relative_to(data)) for path in data.rglob("*.png"))

    def write_labels(first: str) -> str:
        rows = [[name, first if name == names[0] else name.partition("/")[0]] for name in names]
        (tmp_path / "labels.csv").write_text("path,label\n" + "".join(f"{name},{label}\n" for name, label in rows))
        common._digest_images.cache_clear()  # as in the next call of the program
        return common.settings_hash("knn", load_run_config(run))

    labels = f"data.labels={tmp_path / 'labels.csv'}"
    run = make_run(tmp_path / "run", data, labels, "data.val=0.2", epochs=())
    wrong = write_labels("digit_3")
    assert wrong == write_labels("digit_3") != write_labels("digit_0")


def teacher_of(run) -> dict:
    return checkpoint.load_tensors(checkpoint.latest(run).teacher)["teacher"]


def test_an_evaluation_cut_short_leaves_no_rows(run, monkeypatch):
    monkeypatch.setattr(knn, "accuracies", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        evaluate(run)
    assert read_results(run) == []


def test_choice_of_checkpoints(run):
    assert [c.epoch for c in common.choose_checkpoints(run, "all")] == [1, 2]
    assert [c.epoch for c in common.choose_checkpoints(run, "last")] == [2]
    assert [c.epoch for c in common.choose_checkpoints(run, "1")] == [1]
    with pytest.raises(ValueError, match="checkpoints=7: choose last, best, all or one of the epochs 1, 2"):
        common.choose_checkpoints(run, "7")
    with pytest.raises(ValueError, match="has no linear probe, kNN or label-free figures yet"):
        common.choose_checkpoints(run, "best")
    row = {"method": "dinov2", "noise": "gauss50", "dataset": "digits", "seed": 0, "view": "noisy", "protocol": "full"}
    for iteration, metric, value in ((10, "knn20_top1", 60), (20, "knn20_top1", 50), (20, "linear_top1", 40)):
        append_result(
            run / "results.jsonl", row | {"epoch": 0, "iteration": iteration, "metric": metric, "value": value}
        )
    assert [c.epoch for c in common.choose_checkpoints(run, "best")] == [2]  # the only one with a probe
    clean = row | {"noise": "none", "epoch": 0, "iteration": 10, "metric": "linear_top1", "value": 90}
    append_result(run / "results.jsonl", clean)  # which says nothing of the epochs under the run's noise
    assert [c.epoch for c in common.choose_checkpoints(run, "best")] == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval.knn.kk=[5]"], "eval.knn.kk is no key of an evaluation; did you mean eval.knn.k"),
        (["model.depth=3"], "model.depth is no key of an evaluation"),
        (["eval.batch_size=many"], "eval.batch_size=many must be a whole number"),
        (["eval.crop=30"], "eval.crop=30 is no multiple of model.patch_size=8"),
        (["quickly"], "'quickly' is not key=value"),
        (["eval.view=denoised"], "denoised"),
    ],
)
def test_errors_of_the_user(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(run, *arguments)


def test_weights_that_diverged_are_named(run):
    backbone = load_backbone(run)
    backbone.norm.weight.data.fill_(float("nan"))
    save_weights(run, backbone, 3)
    with pytest.raises(ValueError, match=r"iter_0000000030.*32|iter_0000000030.*60 of 60 .*train/digit_0/0.png"):
        evaluate(run)
    assert read_results(run) == []


def test_a_run_without_checkpoints_and_a_folder_that_is_none(tmp_path, digits):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        evaluate(make_run(tmp_path / "new", digits, epochs=()))
    with pytest.raises(ValueError, match="config.yaml"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match="run=DIR"):
        common.parse(["checkpoints=all"], ("checkpoints",))


def test_classes_that_differ_are_refused(tmp_path):
    data = write_digits(tmp_path / "uneven", train=4, val=4)
    (data / "train" / "digit_3").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="digit_3"):
        evaluate(make_run(tmp_path / "run", data, epochs=(1,)))
    (data / "train" / "digit_3").mkdir()
    with pytest.raises(ValueError, match="digit_3"):
        evaluate(make_run(tmp_path / "run2", data, epochs=(1,)))


def test_command_line_ends_with_one_line(run):
    command = [sys.executable, "-m", "dinov2.eval.knn", f"run={run}", "checkpoints=77"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: checkpoints=77: choose last, best, all or one of")


RANKS = """
import sys
from utils import distributed
from tests.dinov2.eval.test_common import evaluate_all
evaluate_all(sys.argv[1])
distributed.close()
"""


def evaluate_all(run):
    evaluate(run)
    for protocol in ("exact", "cached"):
        settings = [f"run={run}", f"eval.linear.protocol={protocol}"]
        common.run("linear", linear.evaluate, "", lambda cfg: [cfg], settings)


def test_two_ranks_give_the_figures_of_one(run, finished_run, tmp_path):
    evaluate_all(run)
    other = shutil.copytree(finished_run, tmp_path / "two_ranks")
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        tmp_path / "ranks.py",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, other], cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    one, two = ({(row["metric"], row["protocol"]): row for row in read_results(folder)} for folder in (run, other))
    assert list(one) == list(two) and len(one) == 4
    for key, row in one.items():
        assert two[key]["details"]["images"] == 32
        if key != ("linear_top1", "cached"):  # there the ranks draw other crops
            assert two[key]["value"] == row["value"]
            assert two[key]["details"].get("classifiers") == row["details"].get("classifiers")
            assert two[key]["details"]["correct"] == row["details"]["correct"]


def test_settings_of_an_older_run_get_defaults(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("    protocol: exact\n", ""))
    cfg = common.load_settings(run, [])
    assert cfg.eval.linear.protocol == "exact" and cfg.eval.retrieval.crop_queries is True
    assert torch.tensor(list(cfg.data.mean)).shape == (3,)


@pytest.mark.parametrize("text", ["007", "a: b", "/x/a #b", "${oc.env:HOME}", "1e3", " x "])
def test_texts_of_an_evaluation_are_taken_to_the_letter(run, text):
    cfg = common.load_settings(run, [f"data.root={text}", f"eval.retrieval.distractors={text}", "data.name=null"])
    assert (cfg.data.root, cfg.eval.retrieval.distractors, cfg.data.name) == (text, text, None)
    for variant in instance_recog.one_per_set(cfg):
        assert variant.data.root == text


@pytest.mark.parametrize("splits", ["train and val", "a share of one folder"])
def test_replaced_validation_images_are_said_and_evaluated_anew(splits, tmp_path, digits, capsys):
    data, val, more = shutil.copytree(digits, tmp_path / "digits"), "val", []
    if splits != "train and val":
        data, val, more = data / "train", ".", ["data.val=0.2"]
    run = make_run(tmp_path / "run", data, epochs=(1,))
    evaluate(run, *more)
    assert len(read_results(run)) == 2
    one, other = (next((data / val / f"digit_{digit}").iterdir()) for digit in (0, 1))
    shutil.copy(other, one)
    common._digest_images.cache_clear()  # as in another process
    evaluate(run, *more)
    assert "the existing rows are of other images or settings; evaluated again" in capsys.readouterr().out
    assert len(read_results(run)) == 4
    evaluate(run, *more)
    assert "1 of 1 evaluations are there already" in capsys.readouterr().out
