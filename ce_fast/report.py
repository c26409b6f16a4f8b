"""One self-contained HTML page of an evaluation or a comparison: its numbers with their standard errors, its plots."""

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import ce_fast
from ce_fast import files, plots
from ce_fast.comparison import ComparisonReport
from ce_fast.evaluation import EvalReport

# Nothing is fetched or sent, whatever a library tries: all a browser may use is in the page.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)
# plotly 7 has a button that uploads the data of a plot to its makers, unless it is told not to.
CONFIG = {"responsive": True, "displaylogo": False, "showSendToCloud": False, "plotlyServerURL": ""}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: 0 } h2 { font-size: 1.2rem; margin-top: 2rem } .about { color: #555; margin: 0 }
table { border-collapse: collapse } th, td { text-align: right; padding: .15rem .8rem; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
.wide { overflow-x: auto } .plot { height: 26rem }
"""
MOST_GROUPS = 500  # lines of the table; the JSON output holds all


def write_html(report, path, *, title=None, source=None):
    """Write one HTML page of a report, which needs no other file and no network.

    Parameters
    ----------
    report : EvalReport or ComparisonReport
        Its numbers become tables with their standard errors; then come the plots that it holds data for.
    path : path-like
        Written whole or not at all: a page that was there stays until the new one is complete.
    title : str, optional
        By default "Evaluation" or "Comparison".
    source : str, optional
        What was evaluated, shown under the title.

    Raises
    ------
    TypeError
        If `report` is of another type.
    ImportError
        Without plotly.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> import ce_fast as ce
    >>> from ce_fast.report import write_html
    >>> evaluator = ce.Evaluator()
    >>> _ = evaluator.update([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [0, 1])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "report.html"
    ...     write_html(evaluator.compute(), path, title="Two rows")
    ...     "<title>Two rows</title>" in path.read_text()
    True
    """
    if isinstance(report, EvalReport):
        title, tables, figures = title or "Evaluation", _evaluation_tables(report), _evaluation_figures(report)
    elif isinstance(report, ComparisonReport):
        title, tables, figures = title or "Comparison", _comparison_tables(report), _comparison_figures(report)
    else:
        raise TypeError(f"report is of type {type(report).__name__}; expected EvalReport or ComparisonReport")
    files.write_whole(Path(path), _page(title, source, tables, figures))


# --- What the page shows ----------------------------------------------------------------------------------------------


def _evaluation_tables(report: EvalReport) -> str:
    tables = _estimates(report) + _counts(report, report.overall)
    if report.groups:
        head = ("group", "rows", "NLL (nats)", "std. error", "perplexity", "std. error", "accuracy", "std. error")
        rows = [
            (label, of.n_rows, *of.nll, *of.perplexity, *of.accuracy)
            for label, of in list(report.groups.items())[:MOST_GROUPS]
        ]
        more = len(report.groups) - len(rows)
        tables += _section("Groups", _table(head, rows) + (f"<p>and {more} more</p>" if more else ""))
    if report.temperatures is not None:
        rows = list(zip(*(report.temperatures[name] for name in ("temperature", "nll", "stderr")), strict=True))
        best = f"<p>Best temperature: {_text(report.best_temperature)}</p>"
        tables += _section("Temperatures", _table(("temperature", "NLL (nats)", "std. error"), rows) + best)
    return tables


def _evaluation_figures(report: EvalReport) -> dict:
    """{name: figure} of what the report holds."""
    figures = {"reliability": plots.reliability_diagram(report), "nll": plots.nll_histogram(report)}
    if report.by_position:
        figures["position"] = plots.loss_by_position(report)
    if report.groups:
        figures["group"] = plots.loss_by_group(report)
    return figures | {"top-k": plots.top_k_curve(report)}


def _comparison_tables(report: ComparisonReport) -> str:
    percentiles = [
        (f"{q:g} %", value, report.target_prob_change_percentiles.get(q, math.nan))
        for q, value in report.kl_percentiles.items()
    ]
    head_of = ("percentile", "KL (nats)", "change of the target's probability")
    tables = _estimates(report) + _counts(report, report)
    return tables + _section("Percentiles", _table(head_of, percentiles))


def _comparison_figures(report: ComparisonReport) -> dict:
    return {"kl": plots.kl_histogram(report)}


def _estimates(report) -> str:
    rows = [(name, *of) for name, of in report.estimates().items()]
    return _section("Numbers", _table(("", "value", "std. error"), rows))


def _counts(report, of) -> str:
    rows: list[tuple] = [("rows that count", of.n_rows), ("their weight", of.weight), ("ignored", report.n_ignored)]
    rows.append(("without a softmax (NaN, infinite)", report.n_invalid))
    if report.n_invalid:
        rows.append(("the first of them", ", ".join(map(str, report.invalid_rows))))
    return _section("Rows", _table(("", "number"), rows))


# --- HTML -------------------------------------------------------------------------------------------------------------


def _text(value) -> str:
    """A cell, escaped."""
    if isinstance(value, float):
        return "n/a" if math.isnan(value) else f"{value:.6g}"
    return html.escape(str(value))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{content}</section>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    top = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    lines = "\n".join("<tr>" + "".join(f"<td>{_text(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'


def _page(title: str, source: str | None, tables: str, figures: dict) -> str:
    from plotly.offline import get_plotlyjs

    options = {"full_html": False, "include_plotlyjs": False, "config": CONFIG}
    drawn = "\n".join(
        f'<div class="plot">{figure.to_html(div_id=f"plot-{name}", **options)}</div>'
        for name, figure in figures.items()
    )
    about = "" if source is None else f'<p class="about">{html.escape(str(source))}</p>'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<h1>{html.escape(title)}</h1>
{about}
<p class="about">ce_fast {ce_fast.__version__}; losses in nats unless said otherwise</p>
{tables}<section><h2>Plots</h2>
{drawn}
</section>
</body>
</html>
"""
