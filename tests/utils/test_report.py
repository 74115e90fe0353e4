"""The report: table, what it says about the ordering, the page's markup, and the page in a real browser."""

import html.parser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.utils.report_runs import FINAL, make_images, make_run, make_runs
from utils import report, report_data
from utils.report_plots import Series, line_chart, psnr, thin
from utils.results import append_result, read_results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    make_runs(folder)
    return folder / "runs"


@pytest.fixture(scope="module")
def page(runs) -> Path:
    denoiser = runs.parent / "denoiser"
    denoiser.mkdir()
    rows = [{"epoch": e, "loss": 1 / (1 + e), "psnr": 14 + e} for e in range(9)]
    (denoiser / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = runs.parent / "report.html"
    assert report.main([str(runs), "--output", str(output), "--denoiser", str(denoiser)]) == 0
    return output


def table_of(paths):
    (table,) = report_data.make_tables(report_data.find_runs(paths))
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
        assert final.mean == rows[-1]["value"] and final.epoch == rows[-1]["epoch"]
    assert [line.evaluated for line in table.lines] == ["noisy"] * 3 + ["denoised", "clean"]


def test_markdown_is_a_table_of_equal_widths(runs, capsys):
    text = report_data.markdown(table_of([runs]))
    rows = text.splitlines()[2:]
    assert len(rows) == 2 + len(FINAL) and len({len(row) for row in rows}) == 1
    assert rows[2].startswith("| DINOv2 ") and re.search(r"\| 5\d\.\d +\|", rows[2])


def test_seeds_are_averaged_and_their_spread_is_said(tmp_path):
    data = make_images(tmp_path / "set", count=2)
    paths = [make_run(tmp_path / f"nct{seed}", "nct", data, final=60 + 4 * seed, seed=seed) for seed in (0, 1)]
    (line,) = table_of(paths).lines
    cell = line.cells["linear_top1", "final"]
    assert cell.mean == pytest.approx(np.mean(cell.values)) and len(cell.values) == 2
    assert re.fullmatch(r"\d+\.\d ± \d\.\d", str(cell)) and line.seeds == 2


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"dinov2": 50, "nc": 60, "nct": 65, "n2n": 65, "clean": 80},
            "the paper's ordering, DINOv2 < NC < NCT ≤ N2N + DINOv2 ≤ clean, shows.",
        ),
        (
            {"dinov2": 50, "nc": 60, "nct": 60, "n2n": 58},
            "the paper's ordering, DINOv2 < NC < NCT ≤ N2N + DINOv2, does not show: NC (60.0) equals NCT (60.0); "
            "NCT (60.0) is above N2N + DINOv2 (58.0).",
        ),
        ({"dinov2": 50, "n2n": 50}, "the paper's ordering, DINOv2 < N2N + DINOv2, does not show: "),
    ],
)
def test_ordering_is_said_plainly(values, sentence):
    assert report_data.ordering({m: float(v) for m, v in values.items()}).startswith(sentence)


def test_verdict_names_what_is_missing_and_how_little_one_seed_says(runs):
    said = " ".join(report_data.verdict(table_of([runs / "dinov2", runs / "nct"])))
    assert "Not among these runs: DINOv2 w/ NC, N2N + DINOv2, DINOv2 (clean)." in said
    assert "One seed each" in said and "400 validation images" in said and "±4.9" in said
    assert report_data.verdict(table_of([runs / "dinov2"])) == []


def test_only_rows_of_the_run_itself_count(tmp_path):
    run = make_run(tmp_path / "nc", "nc", make_images(tmp_path / "set", count=2))
    rows = [r for r in read_results(run) if r["metric"] == "linear_top1"]
    for change in ({"noise": "shot1"}, {"view": "clean"}, {"dataset": "another"}, {"protocol": "cached"}):
        append_result(run / "results.jsonl", rows[-1] | change | {"value": 99.9})
    append_result(run / "results.jsonl", rows[-1] | {"value": 12.5})  # evaluated anew: the last one counts
    (found,) = report_data.find_runs([run])
    assert [r["value"] for r in found.select("linear_top1")] == [r["value"] for r in rows[:-1]] + [12.5]
    assert found.restart == 12 and found.view == "noisy"


def test_knn_column_is_one_that_all_runs_have():
    def run(*ks):
        return report_data.Run(Path("x"), {}, [{"metric": f"knn{k}_top1"} for k in ks], [])

    assert report_data.knn_metric([run(10, 20), run(20, 100)]) == "knn20_top1"
    assert report_data.knn_metric([run(10, 200), run(10, 20, 200), run()]) == "knn10_top1"
    assert report_data.knn_metric([run(10), run(20)]) is None and report_data.knn_metric([run()]) is None


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
    assert audit.ids == ["results0", "robustness0", "retrieval", "training0", "cost", "configs"]
    assert "url(" not in re.sub(r"url\(#", "", text) and "@import" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert text.count(">restart</text>") == 2 and text.count(">trained</text>") == 2
    assert "PSNR in dB" in text and "teacher entropy" in text and "7.5 GB" in text
    assert len(text) < 4_000_000


def test_text_of_runs_is_escaped(tmp_path):
    data = make_images(tmp_path / "set", count=2)
    run = make_run(tmp_path / "<b>run", "<script>alert(1)</script>", data, final=50.0)
    text = report.page(report_data.find_runs([run]), "<i>title")
    assert "<script" not in text and "<i>" not in text and "<b>" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_clean_column_and_psnr_are_left_out_for_images_noisy_by_nature(tmp_path):
    data = make_images(tmp_path / "radar", count=2)
    run = make_run(tmp_path / "run", "dinov2", data, noise="none")
    text = report.page(report_data.find_runs([run]), "x")
    assert "noisy by nature" in text and " dB</span>" not in text


def test_several_noises_have_sections_of_their_own(tmp_path):
    data = make_images(tmp_path / "set", count=2)
    paths = [make_run(tmp_path / noise, "nc", data, noise=noise) for noise in ("gauss50", "shot1")]
    audit = Audit()
    audit.feed(report.page(report_data.find_runs(paths), "x"))
    assert audit.open == [] and {"results0", "results1", "robustness0", "training1"} <= set(audit.ids)


def test_a_run_that_has_just_begun(tmp_path):
    run = make_run(tmp_path / "run", "dinov2", tmp_path / "gone")
    for name in ("results.jsonl", "metrics.jsonl"):
        (run / name).unlink()
    text = report.page(report_data.find_runs([run]), "x")
    assert "not yet" in text and "No pictures of the data" in text


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
    x, y = thin([0, 1, 2], [1.0, float("nan"), 3.0])
    assert x.tolist() == [0, 2] and y.tolist() == [1, 3]
    chart = line_chart([Series("a", 0, range(25_000), range(25_000))], "epoch", "loss")
    assert len(chart) < 30_000 and "var(--s0)" in chart and "#0203" not in chart and "font-family" not in chart


def test_psnr():
    image = np.full((4, 4, 3), 100, dtype=np.uint8)
    assert psnr(image, image) == float("inf")
    assert psnr(image + 10, image) == pytest.approx(10 * np.log10(255**2 / 100))


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


def test_page_does_not_overflow_on_a_phone(page, tmp_path):
    # A script of the test's own in a copy, with all that is folded opened, measures what the browser has laid out.
    measure = "document.title = document.documentElement.scrollWidth + ' of ' + innerWidth"
    text = page.read_text().replace("<details>", "<details open>")
    (tmp_path / "measured.html").write_text(text.replace("</body>", f"<script>{measure}</script></body>"))
    title = re.search(r"<title>(\d+) of (\d+)</title>", browse(tmp_path / "measured.html", tmp_path, 390, "--dump-dom"))
    assert int(title[1]) <= int(title[2]) and int(title[2]) <= 500, title[0]
