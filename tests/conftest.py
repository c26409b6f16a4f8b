"""One fixture runs every numeric test over backend x instruction set, another over dtypes."""

import importlib
import importlib.util
import os
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import settings

import ce_fast as ce

# The same examples at every run, so that a change and nothing else makes a test fail;
# HYPOTHESIS_PROFILE=explore looks for new ones, ten times as many; HYPOTHESIS_PROFILE=long takes fifty times as many.
settings.register_profile("default", derandomize=True, deadline=None, max_examples=200)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=2000)
settings.register_profile("long", derandomize=True, deadline=None, max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

ml_dtypes = pytest.importorskip("ml_dtypes")

DTYPES = [np.dtype(d) for d in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)]
VARIANTS = ["compiled-baseline", "compiled-avx2", "compiled-avx512", "numba"]


def use(variant):
    """A context in which calls run on the variant; skips with the reason where this machine lacks it."""
    backend, _, isa = variant.partition("-")
    stack = ExitStack()
    if backend == "numba":
        if importlib.util.find_spec("numba") is None:
            pytest.skip("numba is not installed")
        stack.enter_context(ce.use_backend("numba"))
        return stack
    if not os.environ.get("CE_FAST_REQUIRE_EXT") and importlib.util.find_spec("ce_fast._kernels") is None:
        pytest.skip("the compiled kernels were not built")
    compiled = importlib.import_module("ce_fast.backends.compiled")
    if isa not in compiled.ISAS:
        pytest.skip(f"this CPU has no {isa}")
    stack.enter_context(ce.use_backend("compiled"))
    stack.enter_context(compiled._use_isa(isa))
    return stack


@pytest.fixture(params=VARIANTS)
def variant(request):
    with use(request.param):
        yield request.param


@pytest.fixture(params=["compiled", "numba"])
def backend(request):
    if request.param == "numba" and importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed")
    with ce.use_backend(request.param):
        yield request.param


@pytest.fixture(params=DTYPES, ids=lambda d: d.name)
def dtype(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(20240501)
