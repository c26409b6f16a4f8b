"""The HTML page of a report: its tables, and what a real browser makes of it."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

import ce_fast as ce
from ce_fast.report import write_html

pytest.importorskip("plotly")

TITLE, SOURCE = "<script>alert(1)</script> & co", 'logits "of" <b>.npy'
GROUPS = np.array(["news", "</script><img src=x>", "r&d"])
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--no-first-run",
    "--no-default-browser-check", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
    "--virtual-time-budget=5000", "--dump-dom",
)  # fmt: skip


@pytest.fixture(scope="module")
def reports():
    """{kind: report}; the evaluation has everything a page can show."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(40, 6, 30)) * 2
    target = rng.integers(30, size=(40, 6))
    target[0, 0], logits[1, 1, 1] = -100, np.nan
    evaluator = ce.Evaluator(class_axis=-1, temperatures=(0.5, 1, 2))
    evaluator.update(logits, target, group=GROUPS[rng.integers(3, size=target.shape)], n_bytes=1000)
    comparison = ce.Comparison(class_axis=-1)
    comparison.update(logits, logits + rng.normal(size=logits.shape) / 4, target)
    return {"evaluation": evaluator.compute(), "comparison": comparison.compute()}


@pytest.fixture(scope="module")
def pages(reports, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for kind, report in reports.items():
        write_html(report, folder / f"{kind}.html", title=TITLE, source=SOURCE)
    return folder


def tables(page):
    """The text of every row of every table of a page."""
    body = page.read_text(encoding="utf-8").partition("<body>")[2]
    rows = re.findall(r"<tr>(.*?)</tr>", body)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def shown(*values):
    return ["n/a" if np.isnan(v) else f"{v:.6g}" for v in values]


# --- The numbers ------------------------------------------------------------------------------------------------------


def test_the_tables_of_an_evaluation_are_its_numbers_with_their_errors(reports, pages):
    report, rows = reports["evaluation"], tables(pages / "evaluation.html")
    m = report.overall
    assert ["negative log-likelihood (nats)", *shown(*m.nll)] in rows
    assert ["bits per byte", *shown(*report.bits_per_byte)] in rows
    assert ["perplexity", *shown(*m.perplexity)] in rows
    assert ["top-5 accuracy", *shown(*m.top_k_accuracy[5])] in rows
    assert ["calibration error", *shown(*report.calibration_error)] in rows
    assert "bits per character" not in [row[0] for row in rows], "nobody counted them"
    assert ["rows that count", "238"] in rows and ["ignored", "1"] in rows
    assert ["without a softmax (NaN, infinite)", "1"] in rows and ["the first of them", "7"] in rows
    for label, of in report.groups.items():
        assert [label, str(of.n_rows), *shown(*of.nll, *of.perplexity, *of.accuracy)] in rows
    for i, temperature in enumerate((0.5, 1.0, 2.0)):
        assert shown(temperature, report.temperatures["nll"][i], report.temperatures["stderr"][i]) in rows


def test_the_tables_of_a_comparison_are_its_numbers_with_their_errors(reports, pages):
    report, rows = reports["comparison"], tables(pages / "comparison.html")
    assert ["KL(base || other) (nats)", *shown(*report.kl)] in rows
    assert ["nll, other - base", *shown(*report.nll_difference)] in rows
    assert ["perplexity, other / base", *shown(*report.perplexity_ratio)] in rows
    for name in ("base", "other"):
        of = getattr(report, name)
        assert [f"perplexity of {name}", *shown(*of.perplexity)] in rows
        assert [f"accuracy of {name}", *shown(*of.accuracy)] in rows
    for q, value in report.kl_percentiles.items():
        assert [f"{q:g} %", *shown(value, report.target_prob_change_percentiles[q])] in rows


# --- The file ---------------------------------------------------------------------------------------------------------


def test_a_page_is_one_escaped_document_with_one_library(pages):
    for page in pages.iterdir():
        text = page.read_text(encoding="utf-8")
        assert text.startswith('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">')
        assert f"<title>{html.escape(TITLE)}</title>" in text and html.escape(SOURCE) in text
        assert TITLE not in text and SOURCE not in text and "<img src=x" not in text
        assert text.count("plotly.js v") <= 1 and 4e6 < len(text) < 6e6
        assert not re.search(r'<(script|link|img)[^>]*\b(src|href)=["\']?http', text)


def test_the_same_report_gives_the_same_bytes(reports, pages, tmp_path):
    write_html(reports["comparison"], str(tmp_path / "again.html"), title=TITLE, source=SOURCE)
    assert (tmp_path / "again.html").read_bytes() == (pages / "comparison.html").read_bytes()


def test_a_report_without_groups_and_positions_has_a_page_without_their_plots(tmp_path):
    evaluator = ce.Evaluator()
    evaluator.update([[2.0, 0.0, -1.0]], [0])
    write_html(evaluator.compute(), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<title>Evaluation</title>" in text
    assert re.findall(r'id="plot-([\w-]+)"', text) == ["reliability", "nll", "top-k"]


def test_what_is_no_report_is_a_clear_error(tmp_path):
    with pytest.raises(TypeError, match="report is of type dict; expected EvalReport or ComparisonReport"):
        write_html({}, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


# --- In a browser -----------------------------------------------------------------------------------------------------


def browse(page, folder):
    """(document as drawn, lines of the console, what the page asked for) of a real browser."""
    log = folder / "net.json"
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'user'}", f"--log-net-log={log}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    params = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # The browser's own requests, which no flag stops, are of no origin; a page from a file has the origin "null".
    asked = {p["url"] for p in params if p.get("initiator", "not an origin") != "not an origin"}
    return done.stdout, console, {url for url in asked if not url.startswith(("file:", "data:", "blob:"))}


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
EVALUATION = {"reliability": "point", "nll": "point", "position": "js-line", "group": "point", "top-k": "js-line"}


@needs_browser
@pytest.mark.parametrize(("kind", "marks"), [("evaluation", EVALUATION), ("comparison", {"kl": "point"})])
def test_a_browser_draws_every_plot_with_no_request_and_no_complaint(pages, tmp_path, kind, marks):
    document, console, asked = browse(pages / f"{kind}.html", tmp_path)
    assert console == [] and asked == set()
    drawn = dict(re.findall(r'<div id="plot-([\w-]+)"(.*?)(?=<div class="plot">|</section>)', document, re.DOTALL))
    assert set(drawn) == set(marks)
    for name, mark in marks.items():
        assert 'class="main-svg"' in drawn[name], name
        assert re.search(rf'class="{mark}"[^>]*>?(<path)?[^>]* d="M[^"]*[LVZ]', drawn[name]), name
    assert 'data-title="Zoom"' in document and 'data-title="Share' not in document, "no button may upload data"


@needs_browser
def test_the_browser_would_tell_of_a_request_and_of_an_error(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<script>fetch('http://127.0.0.1:9/x').catch(() => 0); undefined.x</script>")
    _, console, asked = browse(page, tmp_path)
    assert asked == {"http://127.0.0.1:9/x"} and "TypeError" in console[0]
