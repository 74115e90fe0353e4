"""The report: table, what it says about the ordering, the page's markup, and the page in a real browser."""

import html
import html.parser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from tests.conftest import ROOT
from tests.utils.report_runs import FINAL, FLOORS, make_images, make_run, make_runs
from utils.environment import record_environment
from utils.report import __main__ as report
from utils.report.check import noise_check
from utils.report.curves import ANCHORED, INFORMATION, denoisers, draw_section, run_series, training
from utils.report.data import OBJECTIVES, Run, find_denoisers, find_runs
from utils.report.page import page as make_page
from utils.report.page import render_part
from utils.report.pictures import feature_map, noise_grid, psnr
from utils.report.plots import Series, line_chart, scatter, thin
from utils.report.sections import label_free
from utils.report.table import knn_metric, make_tables, markdown
from utils.report.verdict import verdict
from utils.results import append_result, read_results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for run in make_runs(folder):
        record_environment(run)
    make_denoiser(folder / "runs/denoiser", "gauss255")
    return folder / "runs"


def make_denoiser(folder: Path, noise: str, epochs: int = 9) -> None:
    folder.mkdir(parents=True)
    rows = [{"epoch": e, "loss": 1 / (1 + e), "psnr": 14 + e} for e in range(epochs)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"noise": noise}))


@pytest.fixture(scope="module")
def page(runs) -> Path:
    output = runs.parent / "report.html"
    assert report.main([str(runs), "--output", str(output)]) == 0
    return output


def table_of(paths):
    (table,) = make_tables(find_runs(paths))
    return table


# --- figures


def test_table_has_best_and_final_of_each_method(runs):
    table = table_of([runs])
    assert [line.method for line in table.lines] == ["dinov2", "nc", "nct", "n2n", "clean"]
    assert table.metrics == ["linear_top1", "knn20_top1"]
    for line in table.lines:
        rows = [r for r in read_results(runs / line.method) if r["metric"] == "linear_top1"]
        best, final = line.cells["linear_top1", "best"], line.cells["linear_top1", "final"]
        assert best.mean == max(r["value"] for r in rows)
        restart = 12 if line.method in ("nc", "nct") else 0
        assert final.mean == rows[-1]["value"] and final.epoch == restart + rows[-1]["epoch"]
    assert [line.evaluated for line in table.lines] == ["noisy"] * 3 + ["denoised", "clean"]


def test_markdown_is_a_table_of_equal_widths(runs, capsys):
    text = markdown(table_of([runs]))
    rows = text.splitlines()[2:]
    assert len(rows) == 2 + len(FINAL) + 3 * len(FLOORS) + 1 and len({len(row) for row in rows}) == 1
    assert rows[2].startswith("| DINOv2 ") and re.search(r"\| 5\d\.\d +\|", rows[2])


def test_seeds_are_averaged_and_their_spread_is_said(tmp_path):
    data = make_images(tmp_path / "set", count=2)
    paths = [make_run(tmp_path / f"nct{seed}", "nct", data, final=60 + 4 * seed, seed=seed) for seed in (0, 1)]
    (line,) = table_of(paths).lines
    cell = line.cells["linear_top1", "final"]
    assert cell.mean == pytest.approx(np.mean(cell.values)) and len(cell.values) == 2
    assert re.fullmatch(r"\d+\.\d ± \d\.\d", str(cell)) and line.seeds == 2


def test_only_rows_of_the_run_itself_count(tmp_path):
    run = make_run(tmp_path / "nc", "nc", make_images(tmp_path / "set", count=2))
    rows = [r for r in read_results(run) if r["metric"] == "linear_top1"]
    for change in ({"noise": "shot1"}, {"view": "clean"}, {"dataset": "another"}, {"protocol": "cached"}):
        append_result(run / "results.jsonl", rows[-1] | change | {"value": 99.9})
    append_result(run / "results.jsonl", rows[-1] | {"value": 12.5})  # evaluated anew: the last one counts
    (found,) = find_runs([run])
    assert [r["value"] for r in found.select("linear_top1")] == [r["value"] for r in rows[:-1]] + [12.5]
    assert found.restart == 12 and found.view == "noisy"


def test_knn_column_is_one_that_all_runs_have():
    def run(*ks):
        return Run(Path("x"), {}, [{"metric": f"knn{k}_top1"} for k in ks], [])

    assert knn_metric([run(10, 20), run(20, 100)]) == "knn20_top1"
    assert knn_metric([run(10, 200), run(10, 20, 200), run()]) == "knn10_top1"
    assert knn_metric([run(10), run(20)]) is None and knn_metric([run()]) is None


# --- markup


class Audit(html.parser.HTMLParser):
    """Tags, ids, and everything that a browser would fetch."""

    VOID = {"meta", "img", "br", "path", "rect", "circle", "use", "line"}

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.fetched, self.tags = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if tag == "h2" else []
        for key in ("src", "href", "xlink:href"):
            value = attributes.get(key) or ""
            self.fetched += [value] if value and not value.startswith(("data:image/png;base64,", "#")) else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_page_is_whole_and_asks_nothing_of_a_network(page):
    text = page.read_text()
    audit = Audit()
    audit.feed(text)
    assert audit.open == [] and audit.fetched == []
    assert "script" not in audit.tags and "link" not in audit.tags
    sections = ["results0", "robustness0", "retrieval", "training0", "denoiser", "cost", "environment", "configs"]
    assert audit.ids == sections
    assert "url(" not in re.sub(r"url\(#", "", text) and "@import" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert text.count(">restart</text>") == 2 and text.count(">trained</text>") == 2
    assert "PSNR in dB" in text and "entropy of the targets" in text and "7.5 GB" in text
    assert len(text) < 4_000_000


def test_text_of_runs_is_escaped(tmp_path):
    data = make_images(tmp_path / "set", count=2)
    run = make_run(tmp_path / "<b>run", "<script>alert(1)</script>", data, final=50.0)
    text = make_page(find_runs([run]), "<i>title")
    assert "<script" not in text and "<i>" not in text and "<b>" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_clean_column_and_psnr_are_left_out_for_images_noisy_by_nature(tmp_path):
    data = make_images(tmp_path / "radar", count=2)
    run = make_run(tmp_path / "run", "dinov2", data, noise="none")
    text = make_page(find_runs([run]), "x")
    assert "noisy by nature" in text and " dB</span>" not in text


def test_the_grid_takes_images_as_large_as_the_run_did(tmp_path):
    run = make_run(tmp_path / "run", "dinov2", make_images(tmp_path / "set", count=2))
    table = table_of([run])
    for limit, problem in ((96 * 96, ""), (96 * 96 - 1, "more than the limit of 9215 px")):
        table.runs[0].config["data"]["max_pixels"] = limit
        assert problem in noise_grid(table)["problem"] and bool(noise_grid(table)["rows"]) == (not problem)


def test_several_noises_have_sections_of_their_own(tmp_path):
    data = make_images(tmp_path / "set", count=2)
    paths = [make_run(tmp_path / noise, "nc", data, noise=noise) for noise in ("gauss50", "shot1")]
    audit = Audit()
    audit.feed(make_page(find_runs(paths), "x"))
    assert audit.open == [] and {"results0", "results1", "robustness0", "training1"} <= set(audit.ids)


def test_a_run_that_has_just_begun(tmp_path):
    run = make_run(tmp_path / "run", "dinov2", tmp_path / "gone")
    for name in ("results.jsonl", "metrics.jsonl"):
        (run / name).unlink()
    text = make_page(find_runs([run]), "x")
    assert "not yet" in text and "No pictures of the data" in text


def test_a_run_without_labels_and_without_a_clean_view(tmp_path):
    """No table of accuracies, which it cannot have, and no column for clean pictures."""
    run = make_run(tmp_path / "run", "dinov2", make_images(tmp_path / "set", count=2))
    row = read_results(run)[-1] | {"metric": "rankme", "value": 9.0}
    (run / "results.jsonl").write_text(json.dumps(row) + "\n")
    with np.load(run / "pca.npz") as file:
        content = dict(file)
    noisy = content["views"].tolist().index("noisy")
    for key in ("views", "images", "components"):
        axis = 0 if key == "views" else 1
        content[key] = content[key].take([noisy], axis=axis)
    np.savez(run / "pca.npz", **content)
    text = make_page(find_runs([run]), "x")
    assert "which need labels" in text and '<th>Method</th><th class="wide">Pretrained on' not in text
    assert "<th>input</th>" in text and "<th>clean</th>" not in text
    assert "which need labels" in markdown(table_of([run]))


def test_errors_of_the_user(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        report.main([str(tmp_path / "none")])
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        report.main([str(tmp_path)])
    (tmp_path / "config.yaml").write_text("method: [unclosed")
    with pytest.raises(ValueError, match=r"config\.yaml can't be read"):
        report.main([str(tmp_path)])
    with pytest.raises(ValueError, match="--denoiser"):
        report.main([str(tmp_path), "--denoiser", str(tmp_path)])


def test_long_logs_are_thinned_to_means():
    x, y = thin(np.arange(25_000), np.arange(25_000) % 2)
    assert len(x) == 300 and np.all(np.abs(y - 0.5) < 0.01) and np.all(np.diff(x) > 0)
    assert np.isfinite(thin(np.arange(25_000), np.where(np.arange(25_000) % 9, 1, np.nan))[1]).all()
    x, y = thin([0, 1, 2], [1.0, float("nan"), 3.0])
    assert x.tolist() == [0, 2] and y.tolist() == [1, 3]
    chart = line_chart([Series("a", 0, range(25_000), range(25_000))], "epoch", "loss")[0].svg
    assert len(chart) < 30_000 and "var(--s0)" in chart and "#0203" not in chart and "font-family" not in chart


def test_psnr():
    image = np.full((4, 4, 3), 100, dtype=np.uint8)
    assert psnr(image, image) is None and psnr(None, image) is None
    assert psnr(image + 10, image) == pytest.approx(10 * np.log10(255**2 / 100))


def test_curves_of_one_point_are_dropped():
    one, two = Series("a", 0, [1], [5.0]), Series("b", 1, [1, 2, 3], [5.0, float("nan"), 6.0])
    chart = line_chart([one, two], "epoch", "loss")[0].svg
    assert "var(--s1)" in chart and "var(--s0)" not in chart
    assert line_chart([one, Series("c", 2, [1, 2], [5.0, float("nan")])], "epoch", "loss") == []


# --- curves


def test_first_curve_is_the_information_and_entropies_have_their_maximum(page):
    charts = re.findall(r"<figure>(<svg.*?</svg>)\s*<figcaption>(.*?)</figcaption>", page.read_text(), re.DOTALL)
    titles = [re.findall(r">([^<>]+)</text>", chart)[-1] for chart, _ in charts]
    assert titles[:3] == [
        "information of the targets, CLS",
        "information of the targets, patches",
        "entropy of the targets, CLS",
    ]
    assert "ln K = 6.93" in charts[2][0] and "as a fraction of ln K" in charts[0][1]
    assert all(note.count("Good: ") == 1 or "as scheduled" in note for _, note in charts)
    assert page.read_text().count('<svg role="img"') == len(charts)  # no plot without its line


def test_anchored_sum_has_an_axis_of_its_own(runs):
    found = find_runs([runs / "nct", runs / "dinov2"])
    plain, own = ([chart.svg for chart in draw_section(name, found)] for name in ("Losses", ANCHORED))
    assert "total loss" in plain[0] and "var(--s0)" in plain[0] and "var(--s2)" not in plain[0]
    assert "total loss" in own[0] and "var(--s2)" in own[0] and "var(--s0)" not in own[0]
    assert "anchor ibot loss" in own[1]


def test_older_logs_are_drawn_with_their_batch_entropy(tmp_path):
    rows = [{"epoch": e, "teacher_entropy": 6.0, "teacher_entropy_of_mean": 6.5} for e in range(3)]
    run = Run(tmp_path, {"dino": {"prototypes": 4096}}, [], rows)
    ((chart, _),) = draw_section(INFORMATION, [run])
    assert "teacher entropy" in chart and "ln K = 8.32" in chart
    newer = [row | {"target_entropy_cls": 6.0} for row in rows]
    charts = [chart.svg for chart in draw_section(INFORMATION, [Run(tmp_path, {}, [], newer)])]
    assert len(charts) == 1 and "entropy of the targets, CLS" in charts[0] and "ln K =" not in charts[0]


def test_plots_and_tables_count_the_same_epochs(runs):
    (run,) = find_runs([runs / "nct"])[:1]
    assert run_series(run, "live_knn_top1").x == [12.0, 14, 16, 18, 20]  # from iteration 0 of the stage on
    (line,) = table_of([runs / "nct"]).lines
    assert line.cells["linear_top1", "final"].epoch == 20


def test_several_denoisers_on_one_page(tmp_path):
    data = make_images(tmp_path / "set", count=2)
    for noise in ("gauss255", "shot1"):
        make_run(tmp_path / "out" / noise / "dinov2", "dinov2", data, noise=noise)
        make_denoiser(tmp_path / "out" / noise / "denoiser", noise)
    make_denoiser(tmp_path / "elsewhere", "speckle1.0", epochs=1)
    found = find_denoisers(find_runs([tmp_path / "out"]))
    text = render_part(denoisers, [*found, tmp_path / "elsewhere"])
    assert all(f"</svg>{name}</li>" in text for name in ("gauss255", "shot1", "speckle1.0"))
    assert "var(--s1); stroke-width" in text and "var(--s2); stroke-width" not in text  # one epoch is no curve
    (tmp_path / "elsewhere/config.json").write_text("[")
    assert f"{tmp_path.name}/elsewhere" in render_part(denoisers, [*found, tmp_path / "elsewhere"])
    assert render_part(denoisers, [tmp_path / "elsewhere"]) == ""


def test_environment_of_the_runs(page):
    text = page.read_text().partition('<h2 id="environment">')[2].partition("<h2 id")[0]
    assert "torch " in text and " cores" in text and "<summary>Commands</summary>" in text and "python" in text


# --- in a browser


def browse(page, tmp_path, width, *flags):
    """Runs headless Chromium on a page in a profile of its own."""
    if CHROMIUM is None:
        pytest.skip("no chromium installed (Debian: apt-get install chromium): the page can't be looked at")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--hide-scrollbars", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path}/profile", f"--window-size={width},1400", *flags, page.as_uri(),
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment).stdout


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light")])
def test_page_in_a_browser(page, tmp_path, width, scheme):
    flags = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(page, tmp_path, width, f"--screenshot={tmp_path}/page.png", *flags)
    shot = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert shot.shape == (1400, width, 3)
    assert shot[2, 2].tolist() == ([20, 23, 28] if scheme == "dark" else [255, 255, 255])
    ink = np.abs(shot.astype(int) - shot[2, 2].astype(int)).max(axis=2) > 60
    assert 0.02 < ink.mean() < 0.5  # text and curves, not a blank page
    assert all(part.any() for part in np.array_split(ink, 7))  # down to the bottom
    assert not ink[:, :12].any() and not ink[:, -12:].any()  # nothing runs over the margins


def test_page_on_a_phone(page, tmp_path):
    # A frame of a phone's width holds a copy with all that is folded opened; a script measures what is laid out.
    text = page.read_text().replace("<details>", "<details open>")
    measure = """onload = () => {
      const phone = frames[0].document, rows = [...phone.querySelectorAll(".scroll:has(.pictures, .ranking)")];
      rows.forEach(row => row.scrollLeft = 9999);
      const atEnd = row => row.scrollLeft > 0 && row.scrollLeft + row.clientWidth >= row.scrollWidth - 1;
      const scrolled = rows.filter(atEnd);
      document.title = [phone.documentElement.scrollWidth, rows.length, scrolled.length].join(" ");
    }"""
    frame = f'<iframe style="width: 390px; height: 900px; border: 0" srcdoc="{html.escape(text)}"></iframe>'
    (tmp_path / "phone.html").write_text(f"<!doctype html><title></title>{frame}<script>{measure}</script>")
    title = re.search(r"<title>(\d+) (\d+) (\d+)</title>", browse(tmp_path / "phone.html", tmp_path, 600, "--dump-dom"))
    assert int(title[1]) == 390  # the page itself never scrolls sideways
    assert int(title[2]) == int(title[3]) == 6  # rows of images do, to their end


def test_damaged_files_of_a_run_cost_their_own_section_alone(tmp_path, capsys):
    runs = make_runs(tmp_path)
    results, metrics = runs[0] / "results.jsonl", runs[0] / "metrics.jsonl"
    content = results.read_bytes()
    lines = [b'{"method": "\xff"}', b"[1, 2]", b"7", b"null", b'{"method": "dinov2"}', b"[" * 100_000]
    fields = json.loads(content.splitlines()[0])
    lines += [json.dumps(fields | change).encode() for change in ({"value": None}, {"epoch": "x"}, {"details": []})]
    lines.append(json.dumps(fields | {"epoch": 1, "details": {"images": [1], "seconds": "x"}}).encode())
    results.write_bytes(b"\n".join(lines) + b"\n" + content)
    with open(metrics, "ab") as file:
        file.write(b'{"epoch": "x", "total_loss": 1}\n[]\n\xff\n')
        file.write(b'{"epoch": 1, "total_loss": "x", "$\\\\frac$ loss": 2}\n')
        file.write(b'{"epoch": 2, "$\\\\frac$ loss": 3, "seconds": "x", "knn": 1' + b"0" * 400 + b"}\n")
    (runs[1] / "pca.npz").write_bytes(b"PK\x03\x04 no archive")
    (runs[2] / "retrieval/roxford5k.json").write_text('{"dataset": 1}')
    assert report.main([*map(str, runs), "--output", str(tmp_path / "report.html")]) == 0
    said = capsys.readouterr()
    page = (tmp_path / "report.html").read_text()
    assert "Training curves" in page and "Configurations" in page and "64.1" in said.out
    assert (
        "nc/pca.npz cannot be read" in said.err
        and "rankings is left out" in said.err
        and "Instance recognition" in page
    )
    assert "$\\frac$ loss" in page and "Patch features" in page and "pca is left out" not in said.err


def test_a_foreign_config_is_shown_as_it_is_and_asks_nothing_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hidden-value")
    (run,) = make_runs(tmp_path)[:1]
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("name: null", "name: '${oc.env:SECRET} \\${seed}'"))
    report.main([str(run), "--output", str(tmp_path / "report.html")])
    page = (tmp_path / "report.html").read_text()
    assert "hidden-value" not in page and "${oc.env:SECRET} ${seed}" in page


@pytest.mark.parametrize("change", ["seed: x", "data: [1]", "noise: gauss", "curriculum: {stages: [7, 8]}"])
def test_a_config_that_is_none_is_named(tmp_path, change):
    run = make_runs(tmp_path)[0]
    key = change.partition(":")[0]
    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    config |= OmegaConf.to_container(OmegaConf.create(change))
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    assert key in config
    with pytest.raises(ValueError, match="config.yaml can't be read"):
        report.main([str(run), "--output", str(tmp_path / "report.html")])


def test_what_the_noise_check_found_stands_beside_the_denoiser(tmp_path):
    (tmp_path / "check.json").write_text(json.dumps({"verdict": ["The noise is independent <of> its neighbours"]}))
    section = render_part(noise_check, tmp_path)
    assert "independent from pixel to pixel?" in section and "independent &lt;of&gt; its neighbours." in section
    assert render_part(noise_check, tmp_path / "other") == ""


# --- objectives, figures without labels, maps


def test_every_objective_has_a_name_on_the_page():
    assert {path.stem for path in (ROOT / "dinov2/configs/objectives").glob("*.yaml")} <= set(OBJECTIVES)


def test_runs_of_several_objectives_stand_apart(tmp_path):
    data = make_images(tmp_path / "set", count=2)
    for objective, final in (("dinov2", 50.0), ("simclr", 45.0), ("mine", 40.0)):
        for method in ("dinov2", "nc"):
            run = make_run(tmp_path / "runs" / objective / method, method, data, final + 9 * (method == "nc"))
            config = OmegaConf.load(run / "config.yaml")
            config.objective = objective
            OmegaConf.save(config, run / "config.yaml")
    found = find_runs([tmp_path / "runs"])
    (table,) = make_tables(found)
    names = ["DINOv2", "DINOv2 w/ NC", "SimCLR", "SimCLR w/ NC", "mine", "mine w/ NC"]
    assert [line.name for line in table.lines] == names and list(table.by_objective()) == ["DINOv2", "SimCLR", "mine"]
    sentences = "\n".join(verdict(table))
    assert "the paper's ordering, SimCLR < NC, shows" in sentences and "mine w/ NCT, N2N + mine" in sentences
    assert "N2N + SimCLR" in sentences and "SimCLR w/ NCT" not in sentences  # which it can't have
    text = make_page(found, "x")
    assert "Training curves: SimCLR</h2>" in text and "mine: Accuracy over epochs</h3>" in text
    losses = render_part(training, table.by_objective()["SimCLR"])
    assert "SimCLR w/ NC" in losses and "DINOv2" not in losses


def label_free_row(run, metric, value, epoch):
    row = read_results(run)[0] | {"metric": metric, "value": value, "epoch": epoch, "details": {"by_chance": 0.125}}
    append_result(run / "results.jsonl", row)


def test_figures_without_labels_are_shown_and_unknown_ones_with_them(tmp_path):
    run = make_run(tmp_path / "run", "dinov2", make_images(tmp_path / "set", count=2))
    assert label_free(find_runs([run])) is None
    for epoch in (2, 4):
        label_free_row(run, "rankme", 10.0 + epoch, epoch)
    label_free_row(run, "effective_rank", 7.5, 4)
    label_free_row(run, "another_<i>_figure", 0.25, 4)
    text = render_part(label_free, find_runs([run]))
    assert text.count("<svg role") == 1 and ">14<small>" in text and ">12<small>" not in text  # the last of each
    assert "RankMe after the mean" in text and "another &lt;i&gt; figure" in text and ">0.25<small>chance 0.12" in text


def test_maps_of_the_features(tmp_path):
    run = make_run(tmp_path / "run", "dinov2", make_images(tmp_path / "set", count=2))
    assert "Maps of the features" not in make_page(find_runs([run]), "x")
    points = [[i, i % 3, f"val/{i}.png", "<b>" if i % 2 else "other"] for i in range(9)]
    content = {"method": "pca", "points": points, "thumbnails": "map_thumbs.png", "tile": 16, "explained": [0.5, 0.25]}
    (run / "map.json").write_text(json.dumps(content))
    text = render_part(feature_map, "name", run / "map.json")
    assert "9 images, principal components, explaining 50 % and 25 % of the variance." in text
    assert "<img" not in text and "&lt;b&gt;</text>" in text and "a colour a label" in text
    foreign = {"uri": "http://elsewhere", "name": "another", "chart": {"svg": "<script>"}}
    Image.new("RGB", (30, 20), "red").save(run / "map.png")
    (run / "map.json").write_text(
        json.dumps({"method": "umap", "points": [[*one[:3], None] for one in points]} | foreign)
    )
    text = render_part(feature_map, "name", run / "map.json")
    assert (
        "9 images, UMAP." in text and text.count("<img") == 1 and not re.search("elsewhere|another|script|<svg", text)
    )
    assert "Maps of the features" in make_page(find_runs([run]), "x")
    (run / "map.json").write_text('{"method": "pca", "points": [[1]]}')
    assert "feature map is left out" in render_part(feature_map, "name", run / "map.json")


def test_a_map_of_many_points_stays_small():
    chart = scatter([(i, i, str(i)) for i in range(50_000)], "note")
    assert len(chart.svg) < 400_000 and chart.svg.count("<use") == 2000
