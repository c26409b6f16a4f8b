"""What is built and installed: the wheel, the sdist, and the builds of lesser compilers."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = {
    "__init__", "__main__", "calibration", "cli", "comparison", "config", "distillation", "engine", "evaluation",
    "files", "inputs", "linear", "losses", "metrics", "moments", "passes", "plan", "plots", "reduction", "report",
    "rows", "tables", "threads", "top_k",
    "backends/__init__", "backends/compiled", "backends/numba", "backends/numba_columns", "backends/numba_elements",
    "backends/numba_math", "backends/numba_measure", "backends/numba_rows",
    "adapters/__init__", "adapters/boosting", "adapters/dask", "adapters/numpy", "adapters/torch",
    "adapters/torch_autograd", "adapters/torch_kl", "adapters/torch_linear", "adapters/torch_ops",
    "adapters/torch_parallel", "adapters/torch_patch",
    "adapters/sklearn", "adapters/sklearn_classifier", "adapters/sklearn_display", "adapters/sklearn_inputs",
    "adapters/sklearn_loss", "adapters/sklearn_metrics", "adapters/sklearn_scorer",
}  # fmt: skip
C_SOURCES = {path.name for path in (ROOT / "ce_fast/csrc").iterdir()}

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not run from a source tree")


def run(*command, cwd, **env):
    """Output of a command; its error output is part of what a failure shows."""
    clean = {k: v for k, v in os.environ.items() if k != "CE_FAST_REQUIRE_EXT"}
    done = subprocess.run(
        command, cwd=cwd, env={**clean, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
    )
    return done.returncode, done.stdout


def checked(*command, cwd, **env):
    code, output = run(*command, cwd=cwd, **env)
    assert code == 0, output
    return output


def build(kind, source, target, **env):
    """The one file that `python -m build` makes of the source tree, and the output."""
    output = checked(
        sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(target), str(source),
        cwd=target, **env,
    )  # fmt: skip
    (made,) = target.iterdir()
    return made, output


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a copy of what would be committed: a build writes into its source tree."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    listed = checked("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).split()
    for name in listed:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    made, _ = build("sdist", source, target)
    return made


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A compiler that does not optimize, in a fifth of the time: what is tested here is not speed."""
    return script(tmp_path_factory.mktemp("cc") / "cc", 'exec gcc "$@" -O0')


def script(path, line):
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def unpacked(sdist, tmp_path):
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (folder,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "wheel").mkdir()
    return folder, tmp_path / "wheel"


def test_sdist_holds_all_that_a_build_and_its_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {f"ce_fast/csrc/{name}" for name in C_SOURCES} | {"ce_fast/_kernels.pyx", "setup.py", "LICENSE"}
    expected |= {"adapters/torch.py", "tests/reference.py", "tests/conftest.py", "constraints.txt", "Makefile"}
    assert expected <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_kernels.c"))]


def test_wheel_holds_the_modules_the_extension_and_no_sources(unpacked, quick):
    folder, target = unpacked
    wheel, _ = build("wheel", folder, target, CC=quick, CE_FAST_REQUIRE_EXT="1")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"ce_fast/{name}.py" for name in PYTHON} | {"ce_fast/py.typed", "ce_fast/_kernels.pyi"} <= names
    assert sum(name.startswith("ce_fast/_kernels.") and name.endswith(".so") for name in names) == 1
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"ce_fast"}
    assert not [name for name in names if name.endswith((".c", ".h", ".pyx"))]


def test_sdist_installs_into_an_empty_environment_and_runs_on_numpy_alone(sdist, quick, tmp_path):
    checked(sys.executable, "-m", "venv", str(tmp_path / "env"), cwd=tmp_path)
    python = str(tmp_path / "env/bin/python")
    checked(python, "-m", "pip", "install", "-q", str(sdist), cwd=tmp_path, CC=quick, CE_FAST_REQUIRE_EXT="1")
    code = """
import sys, ce_fast as ce
hosts = {"torch", "sklearn", "numba", "scipy"} & set(sys.modules)
print(ce.show_config(mode="dicts")["backend"], round(ce.cross_entropy([[2.0, 0.0]], [0]), 4), sorted(hosts))
import importlib.util
print(importlib.util.find_spec("ce_fast.adapters.torch") is not None, importlib.util.find_spec("adapters"))
"""
    output = checked(python, "-c", code, cwd=tmp_path)
    assert output.splitlines() == ["compiled 0.1269 []", "True None"]
    freeze = checked(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path)
    assert {line.split("==")[0] for line in freeze.splitlines()} <= {"ce_fast", "numpy", "pip", "setuptools"}


def test_without_a_compiler_the_install_succeeds_and_names_the_numba_extra(unpacked):
    folder, target = unpacked
    wheel, output = build("wheel", folder, target, CC="/nonexistent/cc")
    assert "pip install 'ce_fast[numba]'" in output
    names = zipfile.ZipFile(wheel).namelist()
    assert "ce_fast/backends/numba.py" in names and not [name for name in names if name.endswith(".so")]


def test_without_a_compiler_a_required_extension_is_a_failure(unpacked):
    folder, target = unpacked
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(folder)]
    code, output = run(*command, cwd=target, CC="/nonexistent/cc", CE_FAST_REQUIRE_EXT="1")
    assert code != 0 and "/nonexistent/cc" in output and not list(target.iterdir())


def test_without_openmp_the_build_is_serial_and_says_so(unpacked, quick, tmp_path):
    folder, target = unpacked
    compiler = script(tmp_path / "cc", f'for a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done; exec {quick} "$@"')
    wheel, output = build("wheel", folder, target, CC=compiler, CE_FAST_REQUIRE_EXT="1")
    assert "no working OpenMP" in output
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = """
import sys
sys.path.insert(0, "installed")
import numpy as np, ce_fast as ce
assert "installed" in ce.__file__
config = ce.show_config(mode="dicts")
print(config["openmp"], config["threads"], ce.CrossEntropyLoss(n_threads=2)(np.zeros((8000, 8)), np.zeros(8000, int)))
"""
    assert checked(sys.executable, "-c", code, cwd=tmp_path).split() == ["False", "1", str(3 * 0.6931471805599453)]
