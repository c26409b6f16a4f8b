"""Which backend runs, what is said when one is missing, and what an import costs."""

import importlib
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

import ce_fast as ce

X, T = np.array([[2.0, 0.0, -1.0]]), [0]


def run_python(code, **env):
    """Standard output of a fresh interpreter, and what it raised."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CE_FAST_BACKEND") and k != "CE_FAST_ISA"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True, timeout=120
    )
    return done.stdout.strip(), done.stderr


HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in {names}:
            raise ModuleNotFoundError("hidden for a test: " + name, name=name)
import importlib.util as u
found = u.find_spec
u.find_spec = lambda name, package=None: None if name in {names} else found(name, package)
sys.meta_path.insert(0, Hide())
import ce_fast as ce
"""


def test_compiled_is_the_default():
    out, _ = run_python("import ce_fast as ce; print(ce.show_config(mode='dicts')['backend'])")
    assert out == "compiled"


def test_environment_chooses_the_backend_and_the_isa():
    show = "import ce_fast as ce; c = ce.show_config(mode='dicts'); print(c['backend'], c['isa'])"
    assert run_python(show, CE_FAST_BACKEND="numba")[0].startswith("numba")
    assert run_python(show, CE_FAST_ISA="baseline")[0] == "compiled baseline"
    assert (
        "CE_FAST_BACKEND is 'cuda'; expected one of ('compiled', 'numba')"
        in run_python(show, CE_FAST_BACKEND="cuda")[1]
    )
    assert "CE_FAST_ISA is 'sse9'; this CPU and build have" in run_python(show, CE_FAST_ISA="sse9")[1]


def test_numba_takes_over_where_the_extension_is_missing():
    code = HIDE.format(names=["ce_fast._kernels"]) + "print(ce.show_config(mode='dicts')['backend'])"
    assert run_python(code)[0] == "numba"


def test_asking_for_a_missing_backend_raises():
    code = HIDE.format(names=["ce_fast._kernels"])
    assert "reinstall ce_fast where a C compiler is present" in run_python(code + "ce.use_backend('compiled')")[1]
    code += "ce.cross_entropy([[1.0, 2.0]], [0])"
    assert "CE_FAST_BACKEND is 'compiled', but" in run_python(code, CE_FAST_BACKEND="compiled")[1]
    code = HIDE.format(names=["numba"]) + "ce.use_backend('numba')"
    assert "pip install 'ce_fast[numba]'" in run_python(code)[1]


def test_with_neither_backend_import_works_and_the_first_call_says_what_to_install():
    code = HIDE.format(names=["ce_fast._kernels", "numba"]) + "print('imported', flush=True)\n"
    out, error = run_python(code + "ce.cross_entropy([[1.0, 2.0]], [0])")
    assert out == "imported"
    assert "ImportError: ce_fast has no backend" in error and "pip install 'ce_fast[numba]'" in error


def test_use_backend_is_a_call_and_a_context_manager():
    before = ce.show_config(mode="dicts")["backend"]
    with ce.use_backend("numba"):
        assert ce.show_config(mode="dicts")["backend"] == "numba"
        with ce.use_backend("compiled"):
            assert ce.show_config(mode="dicts")["backend"] == "compiled"
        assert ce.show_config(mode="dicts")["backend"] == "numba"
    assert ce.show_config(mode="dicts")["backend"] == before
    ce.use_backend("numba")
    try:
        assert ce.show_config(mode="dicts")["backend"] == "numba"
    finally:
        ce.use_backend(None)
    assert ce.show_config(mode="dicts")["backend"] == before
    again = ce.use_backend("numba")
    for _ in range(2):
        with again:
            assert ce.show_config(mode="dicts")["backend"] == "numba"
        assert ce.show_config(mode="dicts")["backend"] == before
    with pytest.raises(ValueError, match=r"backend is 'cuda'; expected one of \('compiled', 'numba'\)"):
        ce.use_backend("cuda")


def test_another_thread_keeps_its_own_backend():
    seen = []
    with ce.use_backend("numba"):
        worker = threading.Thread(target=lambda: seen.append(ce.show_config(mode="dicts")["backend"]))
        worker.start()
        worker.join()
    assert seen == ["compiled"]


def test_import_needs_numpy_alone():
    hosts = {"torch", "sklearn", "numba", "scipy", "ml_dtypes", "pandas"}
    code = f"import sys, ce_fast; print(*sorted({hosts} & set(sys.modules)))"
    assert run_python(code) == ("", "")


def test_second_process_does_not_compile_numba_again(tmp_path):
    code = """
import ce_fast as ce, numba
from ce_fast.backends import numba as backend
ce.use_backend("numba")
ce.cross_entropy([[1.0, 2.0]], [0])
print(sum(backend._rows.stats.cache_misses.values()), sum(backend._rows.stats.cache_hits.values()))
"""
    first, _ = run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
    second, _ = run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert (first, second) == ("1 0", "0 1")


@pytest.mark.parametrize("real, lanes", [("float32", "float"), ("float64", "double")])
def test_numba_takes_exp_of_several_logits_at_once(real, lanes):
    """Compiled anew, for the cache keeps no code to look at: the loop that all long rows run multiplies vectors."""
    numba = pytest.importorskip("numba")
    math = importlib.import_module("ce_fast.backends.numba_math")
    kind = getattr(numba.types, real)
    exp_run = numba.njit((kind[::1], numba.types.UniTuple(kind, 8)), error_model="numpy")(math._exp_run.py_func)
    (code,) = exp_run.inspect_llvm().values()
    assert re.search(rf"= fmul [^<\n]*<(vscale x )?\d+ x {lanes}>", code)


def test_backends_agree_to_rounding(dtype, rng):
    logits, target = (rng.standard_normal((50, 300)) * 5).astype(dtype), rng.integers(0, 300, 50)
    results = []
    for name in ("compiled", "numba"):
        with ce.use_backend(name):
            results.append(ce.CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-3).value_and_grad(logits, target))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6 if dtype.itemsize < 8 else 1e-15)


def test_show_config_prints_or_returns(capsys):
    assert ce.show_config() is None
    printed = capsys.readouterr().out
    config = ce.show_config(mode="dicts")
    assert config["backend"] in printed and config["isa"] in printed and config["versions"]["numpy"] == np.__version__
    sklearn = pytest.importorskip("sklearn")
    assert ce.show_config(mode="dicts")["versions"]["sklearn"] == sklearn.__version__
    with pytest.raises(ValueError, match="mode is 'json'; expected 'stdout' or 'dicts'"):
        ce.show_config(mode="json")


def test_adapters_is_refused_as_a_top_level_name():
    _, error = run_python("import sys; sys.path.insert(0, '.'); import adapters")
    assert "this package is ce_fast.adapters, not adapters" in error
