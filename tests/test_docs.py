"""Every example in a docstring or in the README runs, and gives what it says."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

from accuracy import DTYPES
from ce_fast import workloads

README = Path(__file__).resolve().parents[1] / "README.md"
MODULES = [
    "ce_fast", "ce_fast.backends", "ce_fast.bench", "ce_fast.config", "ce_fast.losses",
    "ce_fast.adapters.numpy", "ce_fast.adapters.sklearn", "ce_fast.adapters.torch",
]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_give_what_they_say(name):
    if name.rpartition(".")[2] in ("sklearn", "torch"):
        pytest.importorskip(name.rpartition(".")[2])
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if README.exists() else []


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


def test_readme_shows_every_workload_and_every_dtype_that_the_commands_measure():
    text = README.read_text()
    assert all(f"| {work.work} {list(work.shape)} |" in text for work in workloads.WORKLOADS)
    assert all(f"| {name} | loss |" in text for name in DTYPES)
