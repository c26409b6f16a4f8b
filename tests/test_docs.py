"""Every example in a docstring or in the README runs and gives what it says; the contributing guide shows real code."""

import contextlib
import doctest
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest

import ce_fast as ce
from accuracy import DTYPES
from ce_fast import cli, workloads

ROOT = Path(__file__).resolve().parents[1]
README, GUIDE, EVALUATION = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "evaluation.md"
MODULES = [
    "ce_fast", "ce_fast.backends", "ce_fast.bench", "ce_fast.calibration", "ce_fast.comparison", "ce_fast.config",
    "ce_fast.distillation", "ce_fast.evaluation", "ce_fast.files", "ce_fast.linear", "ce_fast.losses",
    "ce_fast.moments", "ce_fast.plots", "ce_fast.report", "ce_fast.rows", "ce_fast.adapters.boosting",
    "ce_fast.adapters.dask", "ce_fast.adapters.numpy", "ce_fast.adapters.sklearn_classifier",
    "ce_fast.adapters.sklearn_display", "ce_fast.adapters.sklearn_loss", "ce_fast.adapters.sklearn_metrics",
    "ce_fast.adapters.sklearn_scorer", "ce_fast.adapters.torch", "ce_fast.adapters.torch_parallel",
    "ce_fast.adapters.torch_patch",
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_give_what_they_say(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def blocks(path=README, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL) if path.exists() else []


@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.splitlines()[0][:40])
def test_readme_examples_run(block):
    if "torch" in block:
        pytest.importorskip("torch")
    if "sklearn" in block:
        pytest.importorskip("sklearn")
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_readme_has_an_example_for_each_adapter():
    text = "\n".join(blocks())
    assert all(name in text for name in ("import ce_fast as ce", "ce_fast.adapters.sklearn", "ce_fast.adapters.torch"))


def test_readme_names_all_that_is_public():
    text = README.read_text()
    assert [name for name in ce.__all__ if not name.startswith("_") and not re.search(rf"\b{name}\b", text)] == []


def test_readme_shows_every_workload_and_every_dtype_that_the_commands_measure():
    text = README.read_text()
    assert all(f"| {work.work} {list(work.shape)} |" in text for work in workloads.WORKLOADS)
    assert all(f"| {name} | loss |" in text for name in DTYPES)


def run_command(line):
    program, *argv = shlex.split(line)
    assert program == "ce-fast" and cli.main(argv) == 0, line


def trimmed(text):
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def test_the_evaluation_page_prints_what_it_shows(tmp_path, monkeypatch):
    """Top to bottom: ```python in one namespace, ```sh by the command; ```text is what the block before it printed."""
    for name in ("dask", "matplotlib", "ml_dtypes", "plotly", "pyarrow", "rich", "safetensors"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    text, names, printed = EVALUATION.read_text(), {"__name__": "page"}, io.StringIO()
    for block in re.finditer(r"^```(python|sh|text)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        language, code = block.groups()
        line = text[: block.start()].count("\n") + 1
        if language == "text":
            shown, found = trimmed(code), trimmed(printed.getvalue())
            if shown[-1] == "...":
                shown, found = shown[:-1], found[: len(shown) - 1]
            assert shown == found, f"docs/evaluation.md, line {line}"
            continue
        with contextlib.redirect_stdout(printed := io.StringIO()):
            if language == "python":
                exec(compile("\n" * line + code, str(EVALUATION), "exec"), names)
            else:
                for command in code.splitlines():
                    run_command(command)


def added_lines():
    """(path, line) of every line that a diff of the contributing guide adds, but blank ones."""
    for block in blocks(GUIDE, "diff"):
        path = None
        for line in block.splitlines():
            if line.startswith("+++ "):
                path = line.removeprefix("+++ b/")
            elif line.startswith("+") and line[1:].strip():
                yield path, line[1:].strip()


def test_the_contributing_guide_adds_a_loss_by_lines_that_are_there():
    added = list(added_lines())
    kinds = {Path(path).suffix for path, _ in added}
    assert kinds == {".h", ".py"}, "the guide shows the kernels and Python"
    files = {path: [line.strip() for line in (ROOT / path).read_text().splitlines()] for path, _ in added}
    gone = [f"{path}: {line}" for path, line in added if line not in files[path]]
    assert not gone, "the guide shows lines that are not in the code:\n" + "\n".join(gone)
