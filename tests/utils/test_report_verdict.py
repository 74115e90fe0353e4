"""What the report says of figures: floors, learned or not, the ordering, bold, collapse, trials."""

import pytest
from omegaconf import OmegaConf

from tests.utils.report_runs import FLOORS, IMAGES, details_of, make_floor, make_images, make_run, make_runs
from utils.report import __main__ as report
from utils.report.curves import results
from utils.report.data import Run, find_runs
from utils.report.page import page, render_part
from utils.report.table import Cell, is_ahead, learned, make_tables, markdown
from utils.report.verdict import ordering, verdict
from utils.results import append_result, read_results


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "set", count=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    make_runs(folder)
    return folder / "runs"


def table_of(*paths):
    (table,) = make_tables(find_runs(list(paths)))
    return table


def said(table):
    return "\n".join(verdict(table))


def cell(value, seed=0, bits=False, **details):
    known = details_of(value, draw=seed) if bits else {"images": IMAGES}
    return Cell([{"value": value, "seed": seed, "details": known | details}])


def older(run):
    """The run's rows as they were before they said which images were right."""
    rows = read_results(run)
    (run / "results.jsonl").unlink()
    for row in rows:
        row["details"] = {"images": row["details"]["images"]} if "images" in row["details"] else {}
        append_result(run / "results.jsonl", row)


# --- floors


def test_floors_of_each_view_stand_under_the_methods(runs):
    table = table_of(runs)
    assert [(line.method, line.evaluated) for line in table.floors] == [
        (method, view) for view in ("noisy", "denoised", "clean") for method in FLOORS
    ]
    for line in table.lines:
        assert {floor.evaluated for floor in line.floors} == {line.evaluated} and len(line.floors) == 3
    assert table.runs and not any(run.is_floor for run in table.runs)
    assert table.all_lines[-1].cells["linear_top1", "final"].mean == 10.0
    text = markdown(table)
    assert "| Raw pixels " in text and "| Chance, 10 classes " in text


def test_floors_are_found_wherever_the_runs_are_named(data, tmp_path):
    run = make_run(tmp_path / "out/gauss255/dinov2", "dinov2", data)
    clean = make_run(tmp_path / "out/clean", "clean", data)
    make_floor(tmp_path / "out", "pixels", data)
    (tmp_path / "out/images/train").mkdir(parents=True)
    (tmp_path / "out/images/train/config.yaml").write_text("no: run")
    for paths in ([tmp_path / "out"], [run, clean], [run.parent, clean]):
        found = find_runs(paths)
        assert sorted(one.method for one in found) == ["clean", "dinov2", "pixels"]
    given = find_runs([run, tmp_path / "out/floors/gauss255-noisy/pixels"])
    assert [one.method for one in given] == ["dinov2", "pixels"]
    with pytest.raises(ValueError, match="floors only: name the runs"):
        make_tables(find_runs([tmp_path / "out/floors"]))


def test_seeds_of_the_untrained_backbone_are_averaged(data, tmp_path):
    run = make_run(tmp_path / "dinov2", "dinov2", data)
    for seed, value in enumerate((30.0, 34.0)):
        make_floor(tmp_path, "untrained", data, value, seed=seed)
    (floor,) = table_of(run).floors
    assert floor.final("linear_top1").mean == 32.0 and str(floor.final("linear_top1")) == "32.0 ± 2.8"


def test_clean_floors_serve_every_noise_and_count_once(data, tmp_path):
    run = make_run(tmp_path / "clean", "clean", data)
    for noise, value in (("gauss255", 30.0), ("none", 31.0)):
        make_floor(tmp_path, "pixels", data, value, view="clean", noise=noise)
    (floor,) = table_of(run).floors
    assert floor.final("linear_top1").values == [31.0]  # of the table's own noise where there is one


@pytest.mark.parametrize(
    ("method", "details", "reason"),
    [
        ("pixels", {"crop": 32}, "Raw pixels (noisy) is kept out: it has 32 pixels of the evaluation crop, the runs"),
        ("untrained", {"architecture": "vit_tiny"}, "it has vit_tiny as its architecture, the runs have vit_small"),
        ("pixels", {"images": 0}, "it has no validation images"),
        ("public", {"images": 50}, "it has 50 validation images, the runs have 400"),
    ],
)
def test_floors_that_do_not_fit_are_kept_out(data, tmp_path, method, details, reason):
    run = make_run(tmp_path / "dinov2", "dinov2", data)
    make_floor(tmp_path, method, data, **details)
    table = table_of(run)
    assert table.floors == [] and reason in said(table)


def test_a_public_backbone_may_be_of_another_architecture(data, tmp_path):
    run = make_run(tmp_path / "dinov2", "dinov2", data)
    make_floor(tmp_path, "public", data, architecture="vit_large")
    assert [line.method for line in table_of(run).floors] == ["public"]


def test_figures_without_labels_keep_no_floor_out(data, tmp_path):
    """They are of training images, and more of them."""
    run = make_run(tmp_path / "out/gauss255/dinov2", "dinov2", data)
    make_floor(tmp_path / "out", "pixels", data)
    row = read_results(run)[-1] | {"metric": "rankme", "details": {"images": 7 * IMAGES, "split": "train"}}
    append_result(run / "results.jsonl", row)
    table = table_of(tmp_path / "out")
    assert "kept out" not in said(table) and [line.method for line in table.floors] == ["pixels"]


def test_floors_without_rows_or_of_other_data_are_kept_out(data, tmp_path):
    run = make_run(tmp_path / "dinov2", "dinov2", data)
    (make_floor(tmp_path, "pixels", data) / "results.jsonl").unlink()
    make_floor(tmp_path, "untrained", make_images(tmp_path / "another", count=2))
    table = table_of(run)
    assert table.floors == []
    assert "Raw pixels (noisy) is kept out: it has no validation images." in said(table)
    assert "Floors of another data set, another, are kept out." in said(table)


def test_floors_of_another_noise_belong_to_another_table(data, tmp_path):
    run = make_run(tmp_path / "dinov2", "dinov2", data, noise="shot1")
    make_floor(tmp_path, "pixels", data)
    table = table_of(run)
    assert table.floors == [] and "kept out" not in said(table)


# --- learned


def with_floors(folder, data, final, untrained=30.0, pixels=45.0, **changes):
    run = make_run(folder / "dinov2", "dinov2", data, final=final, **changes)
    for method, value in (("untrained", untrained), ("pixels", pixels)):
        if value is not None:
            make_floor(folder, method, data, value)
    return table_of(run)


@pytest.mark.parametrize(
    ("final", "floors", "word"),
    [
        (55.0, {}, "yes"),
        (38.0, {}, "no"),  # above an untrained backbone, below the raw pixels
        (46.0, {}, "unclear"),
        (55.0, {"untrained": None}, "unclear"),
        (35.0, {"untrained": None}, "no"),
        (55.0, {"untrained": None, "pixels": None}, "unknown"),
    ],
)
def test_learned_in_one_word(data, tmp_path, final, floors, word):
    table = with_floors(tmp_path, data, final, **floors)
    assert learned(table.lines[0], table.metrics) == word
    assert markdown(table).splitlines()[4].rstrip(" |").endswith(word)
    assert all(learned(line, table.metrics) == "–" for line in table.floors)
    assert ("Both floors are needed" in said(table)) == (None in floors.values())


def test_learned_needs_every_metric(data, tmp_path):
    table = with_floors(tmp_path, data, 60.0)
    knn = table.lines[0].cells["knn20_top1", "final"].rows[0]
    knn["value"], knn["details"] = 5.0, details_of(5.0)
    assert learned(table.lines[0], table.metrics) == "unclear"


def test_summary_in_plain_words(data, tmp_path):
    table = with_floors(tmp_path, data, 61.2, untrained=21.0, pixels=66.5)
    final = table.lines[0].final("linear_top1").mean
    sentence = f"Linear probe: DINOv2: {final:.1f}, {final - 21:.1f} above an untrained backbone, "
    assert sentence + f"{66.5 - final:.1f} below the raw pixels" in said(table)
    assert "rests on the final checkpoints" in said(table) and "over the validation images, paired" in said(table)


# --- the ordering


def test_a_trial_of_a_few_steps_shows_no_ordering():
    finals = {method: cell(value, images=360) for method, value in (("dinov2", 8.7), ("nc", 9.0), ("nct", 9.6))}
    sentence = ordering(finals)
    assert "shows" not in sentence and "does not show" not in sentence
    assert "DINOv2 and NC cannot be told apart (+0.3, standard error 2.1)" in sentence
    assert "NC and NCT cannot be told apart (+0.6, standard error 2.2)" in sentence


def test_ordering_shows_only_beyond_two_standard_errors():
    values = {"dinov2": 50.0, "nc": 60.0, "nct": 70.0, "n2n": 80.0, "clean": 90.0}
    chain = "the paper's ordering, DINOv2 < NC < NCT ≤ N2N + DINOv2 ≤ clean, "
    assert ordering({m: cell(v) for m, v in values.items()}).startswith(chain + "shows: NC is above")
    closer = {m: cell(v) for m, v in (values | {"nct": 66.0}).items()}
    assert ordering(closer).startswith(chain + "is not settled: NC and NCT cannot be told apart (+6.0")
    told = {m: cell(v, bits=True) for m, v in (values | {"nct": 66.0}).items()}  # the same, paired over the images
    assert ordering(told).startswith(chain + "shows: ")
    wrong = {m: cell(v) for m, v in (values | {"nct": 50.0}).items()}
    assert ordering(wrong).startswith(chain + "does not show: NCT is below NC (-10.0, standard error")


def test_ordering_over_seeds():
    def seeds(*values):
        return Cell([row for seed, value in enumerate(values) for row in cell(value, seed).rows])

    finals = {"dinov2": seeds(50, 54, 58), "nc": seeds(51, 55.1, 59)}
    assert ordering(finals).startswith("the paper's ordering, DINOv2 < NC, shows: NC is above DINOv2 (+1.0")


def test_verdict_names_what_is_missing_and_how_little_one_seed_says(data, tmp_path):
    paths = [make_run(tmp_path / method, method, data) for method in ("dinov2", "nct")]
    sentences = said(table_of(*paths))
    assert "Not among these runs: DINOv2 w/ NC, N2N + DINOv2, DINOv2 (clean)." in sentences
    others = [make_run(tmp_path / "simclr" / method, method, data) for method in ("dinov2", "nc")]
    for other in others:
        (other / "config.yaml").write_text("objective: simclr\n" + (other / "config.yaml").read_text())
    assert "Not among these runs: N2N + SimCLR, SimCLR (clean)." in said(table_of(*others))  # it can't have NCT
    assert "One seed each" in sentences and "400 validation images" in sentences and "±4.9" in sentences
    assert "Not among these runs" not in said(table_of(paths[0]))


def test_runs_of_one_seed_with_other_settings_are_said_to_share_a_line(data, tmp_path):
    runs = [make_run(tmp_path / str(number), "nct", data, seed=seed) for number, seed in enumerate((0, 1, 1))]
    assert "DINOv2 w/ NCT is the mean of 3 runs of 2 seeds: its ± is not that of seeds alone" in said(table_of(*runs))
    assert "is the mean of" not in said(table_of(*runs[:2]))


def test_older_rows_are_read(data, tmp_path):
    paths = [make_run(tmp_path / method, method, data) for method in ("dinov2", "nct")]
    for run in paths:
        older(run)
    table = table_of(*paths)
    assert "DINOv2 < NCT, shows" in said(table) and "two unpaired counts" in said(table)
    assert "Chance" not in markdown(table)
    make_floor(tmp_path, "pixels", data)
    assert [line.method for line in table_of(*paths).floors] == ["pixels"]


def test_bold_is_what_is_ahead_of_all_others(runs, data, tmp_path):
    table = table_of(runs)
    bold = [line.method for line in table.lines if is_ahead(line, "linear_top1", table)]
    assert bold == ["nct"]  # not n2n or clean, which are higher
    assert render_part(results, table).count('class="n top"') == len(table.metrics)
    paths = [make_run(tmp_path / method, method, data, final=60.0) for method in ("dinov2", "nc")]
    for run in paths:
        older(run)
    assert 'class="n top"' not in render_part(results, table_of(*paths))
    assert 'class="n top"' not in render_part(results, table_of(paths[0]))  # nothing to be ahead of


# --- collapse, trials


def test_collapse_is_said_in_table_and_page(data, tmp_path):
    run = make_run(tmp_path / "nc", "nc", data, collapsed="uniform")
    (found,) = find_runs([run])
    assert found.collapse() == ("uniform", 16)  # half of the noisy stage of 8 epochs, after the restart at 12
    sentence = "Collapsed: DINOv2 w/ NC, seed 0, uniform: every image gets the same target, all prototypes alike; since"
    assert sentence + " epoch 16." in said(table_of(run))
    assert "| DINOv2 w/ NC (collapsed) " in markdown(table_of(run))
    text = page([found], "x")
    assert sentence in text.partition("<nav>")[0] and ">collapsed</text>" in text


def test_a_run_that_recovered_is_not_collapsed(tmp_path):
    def run(*states):
        rows = [{"epoch": e, "collapsed": state} for e, state in enumerate(states)]
        return Run(tmp_path, {}, [], [*rows, {"epoch": 9, "live_knn_top1": 1.0}])

    assert run("uniform", "").collapse() is None and run().collapse() is None
    assert run("uniform", "", "one prototype", "uniform").collapse() == ("uniform", 2)


def test_trial_stands_in_table_and_page(data, tmp_path):
    run = make_run(tmp_path / "dinov2", "dinov2", data, trial=True)
    table = table_of(run)
    text = markdown(table)
    assert text.splitlines()[0].endswith("(TRIAL: nothing is meant by these figures)")
    assert "| DINOv2 (TRIAL) " in text and said(table).startswith("TRIAL: ")
    assert "TRIAL" in page(find_runs([run]), "x").partition("<nav>")[0]
    config = OmegaConf.load(run / "config.yaml")
    config.trial = False
    OmegaConf.save(config, run / "config.yaml")
    assert "TRIAL" not in markdown(table_of(run))


def test_main_prints_the_summary(runs, tmp_path, capsys):
    assert report.main([str(runs), "--output", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "above an untrained backbone" in printed and "| Untrained backbone " in printed
