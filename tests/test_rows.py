"""What evaluation asks of each row: against the oracle, over backends, instruction sets and dtypes; rows in parts."""

import itertools
import math
from dataclasses import fields, replace

import mpmath
import numpy as np
import pytest

import ce_fast as ce
import reference
from ce_fast import inputs, rows
from ce_fast.backends import Rows
from tolerances import TOLERANCES

INF, NAN = math.inf, math.nan
FLOATS = ("lse", "log_prob", "max", "entropy", "sum_sq_prob", "brier")
# (n_classes, spread): either side of vectors, tiles and runs; flat, ordinary, certain, and beyond what exp can hold
SHAPES = [(1, 1.0), (2, 3.0), (10, 3.0), (31, 0.0), (33, 8.0), (257, 3.0), (1024, 2.0), (1025, 12.0), (3100, 60.0)]


def logits_of(rng, dtype, n_classes, spread, n_rows=12):
    """Rows with their targets: the largest, ties before and after the target, a far one, one of -inf."""
    x = rng.standard_normal((n_rows, n_classes)) * spread + rng.uniform(-5, 5, (n_rows, 1))
    target = rng.integers(0, n_classes, n_rows)
    target[0], target[1] = x[0].argmax(), x[1].argmin()
    x[2] = x[2].round()
    x[3] = x[3, 0]
    if n_classes > 2:
        x[4, target[4] - 1] = -INF
        x[5, target[5]] = -INF
        x[6, target[6] - 1] += 20  # surely another
        x[7, target[7]] += 20
    return x.astype(dtype), target


def values_of(x, target=None, temperature=1.0, **options):
    logits = inputs.as_logits(x, -1)
    return rows.row_values(logits, Rows(target), temperature=temperature, **options)


def assert_values_close(values, expected, dtype, of=FLOATS, magnified=1.0):
    """Floats within the ulp of a loss, of themselves; sums of squares of probabilities within twice that; lse, a sum of
    two numbers, of the larger of them; all that magnified. Integers equal."""
    tol = TOLERANCES[np.dtype(dtype).name]
    for name in of:
        actual, exact = np.asarray(getattr(values, name), np.longdouble), expected[name]
        finite = np.isfinite(exact)
        np.testing.assert_array_equal(actual[~finite].astype(float), exact[~finite].astype(float), err_msg=name)
        terms = np.maximum(np.abs(exact), np.abs(expected["max"]) + 1) if name == "lse" else np.abs(exact)
        ulp = tol.loss_ulp * (2 if name in ("sum_sq_prob", "brier") else 1)
        error, bound = np.abs(actual - exact)[finite], (magnified * ulp * tol.eps * terms + tol.floor)[finite]
        assert (error <= bound).all(), f"{name} is off by {float((error / bound).max()) * ulp:.3g} ulp"
    for name in ("argmax", "rank") if "log_prob" in of else ("argmax",):
        np.testing.assert_array_equal(getattr(values, name), expected[name], err_msg=name)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf - inf, of the oracle and of its errors
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("n_classes", "spread"), SHAPES)
def test_values_are_those_of_the_formulas(variant, dtype, rng, n_classes, spread, temperature):
    x, target = logits_of(rng, dtype, n_classes, spread)
    expected = reference.row_measures(x, target, temperature)
    assert_values_close(values_of(x, target, temperature), expected, dtype)
    alone = values_of(x, None, temperature)
    assert_values_close(
        alone, reference.row_measures(x, None, temperature), dtype, ("lse", "max", "entropy", "sum_sq_prob")
    )
    assert np.isnan(alone.log_prob).all() and (alone.rank == -1).all()


def test_the_oracle_is_right():
    x, t = [mpmath.mpf(v) for v in ("0.25", "-3", "2.5", "2.5", "40")], 2
    with mpmath.workdps(40):
        lse = mpmath.log(sum(mpmath.exp(v) for v in x))
        p = [mpmath.exp(v - lse) for v in x]
        expected = {
            "lse": lse,
            "log_prob": x[t] - lse,
            "entropy": -sum(v * mpmath.log(v) for v in p),
            "sum_sq_prob": sum(v * v for v in p),
            "brier": sum((v - (k == t)) ** 2 for k, v in enumerate(p)),
        }
        found = reference.row_measures([[float(v) for v in x]], np.array([t]))
        for name, value in expected.items():
            assert float(found[name][0]) == pytest.approx(float(value), rel=1e-15), name
    assert (found["rank"][0], found["argmax"][0]) == (1, 4)


def test_the_largest_class_is_exact_where_the_target_is_another(variant, dtype):
    """p_top near 1 and not the target's: what the others add to the sum would cancel."""
    for gap in (0.75, 3.0, 12.0, 16.0):
        x = np.zeros((1, 1500), dtype)
        x[0, 1200] = gap + np.log(1500)
        for target in (None, np.array([3])):
            found, exact = values_of(x, target), reference.row_measures(x, target)
            assert_values_close(found, exact, dtype, ("lse", "entropy", "sum_sq_prob"))


def test_ties_go_to_the_lower_class(variant, dtype):
    for n_classes, at in ((3, (0, 2)), (1100, (5, 1050)), (2500, (1000, 1040))):
        x = np.full((2, n_classes), -1, dtype)
        x[:, at] = 4
        values = values_of(x, np.array(at))
        assert values.argmax.tolist() == [at[0], at[0]]
        assert values.rank.tolist() == [0, 1]


@pytest.mark.parametrize("n_classes", [4, 1300])
def test_a_row_without_a_softmax_gives_nan_and_what_numpy_says_of_it(variant, dtype, n_classes):
    x = np.zeros((5, n_classes), dtype)
    x[0, 2], x[1, n_classes - 1], x[2], x[3, [1, 3]] = NAN, INF, -INF, (INF, NAN)
    values = values_of(x, np.array([2, 0, 1, 0, 1]))
    np.testing.assert_array_equal(values.lse[:4], [NAN, INF, -INF, NAN])
    np.testing.assert_array_equal(values.argmax, [2, n_classes - 1, 0, 3, 0])
    np.testing.assert_array_equal(values.max, x.astype(float).max(-1))
    np.testing.assert_array_equal(values.rank, [0, 1, 1, 2, 1])  # NaN before all
    for name in ("log_prob", "entropy", "sum_sq_prob", "brier"):
        assert np.isnan(getattr(values, name)).tolist() == [True] * 4 + [False]


def test_a_target_of_minus_infinity_is_impossible_and_comes_last(variant, dtype):
    x = np.array([[0.0, -INF, 1.0, -INF]], dtype)
    for target, rank in ((1, 2), (3, 3)):
        values = values_of(x, np.array([target]))
        assert values.log_prob[0] == -INF and values.rank[0] == rank
        assert values.brier[0] == pytest.approx(1 + values.sum_sq_prob[0], rel=1e-6)


def test_rows_that_do_not_count_are_not_read(variant, dtype):
    x = np.full((3, 40), NAN, dtype)
    x[1] = 0
    logits, target = inputs.as_logits(x, -1), np.array([-100, 5, 999])
    values = rows.row_values(logits, Rows(target, sample_weight=np.array([1.0, 0.5, 0.0])))
    assert values.rank.tolist() == [-1, 5, -1] and values.argmax.tolist() == [-1, 0, -1]
    assert np.isnan(values.lse).tolist() == [True, False, True]


def test_a_target_that_is_no_class_is_an_error(backend):
    with pytest.raises(IndexError, match=r"target\[1\] is 3; expected 0 <= target < 3 or ignore_index=-100"):
        ce.row_stats(np.zeros((2, 3)), [0, 3])
    with pytest.raises(TypeError, match="class probabilities"):
        ce.row_stats(np.zeros((2, 3)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="temperature"):
        ce.row_stats(np.zeros((2, 3)), temperature=0)


@pytest.mark.parametrize("n_threads", [2, 3])
def test_bits_are_the_same_for_any_number_of_threads(backend, n_threads, rng):
    x, target = rng.standard_normal((700, 130)).astype(np.float32), rng.integers(0, 130, 700)
    one, many = (values_of(x, target, n_threads=n) for n in (1, n_threads))
    for field in fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(many, field.name))


def test_any_layout_gives_the_same(variant, dtype, rng):
    x, target = rng.standard_normal((2, 3, 70, 4)).astype(dtype), rng.integers(0, 70, (2, 3, 4))
    moved = np.ascontiguousarray(np.moveaxis(x, 2, -1))
    expected = ce.row_stats(moved, target, class_axis=-1)
    wide = np.zeros((2, 3, 140, 4), dtype)
    wide[:, :, ::-2] = x
    swapped = x.astype(x.dtype.newbyteorder()) if x.dtype.kind == "f" else x
    for same in (x, wide[:, :, ::-2], np.asfortranarray(x), swapped):
        found = ce.row_stats(same, target.astype(np.int8), class_axis=2)
        for field in fields(found):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


def test_results_have_the_shape_of_the_rows_and_the_compute_dtype(backend, dtype):
    stats = ce.row_stats(np.zeros((2, 5, 3), dtype), class_axis=1)
    assert stats.log_prob is None and stats.rank is None
    assert stats.lse.shape == stats.argmax.shape == (2, 3)
    assert stats.lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert stats.argmax.dtype == np.int64
    empty = ce.row_stats(np.zeros((0, 3), dtype), np.zeros(0, int))
    assert empty.rank is not None and empty.rank.shape == (0,)
    assert ce.row_stats(np.zeros(3, dtype), 1).lse.shape == ()


# --- rows in parts ----------------------------------------------------------------------------------------------------


def in_parts(x, target, cuts, counts=None, temperature=1.0):
    counts = np.ones(len(x), bool) if counts is None else counts
    own = np.array([x[i, t] if c else 0 for i, (t, c) in enumerate(zip(target, counts, strict=True))], float)
    ends = [0, *cuts, x.shape[1]]
    return rows.merge_parts(
        [
            rows.part_values(x[:, a:b], a, target, own, counts, temperature=temperature)
            for a, b in itertools.pairwise(ends)
        ]
    )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("n_classes", "spread"), [shape for shape in SHAPES if shape[0] > 9])
def test_parts_of_rows_give_the_whole(variant, dtype, rng, n_classes, spread, temperature):
    x, target = logits_of(rng, dtype, n_classes, spread)
    expected = reference.row_measures(x, target, temperature)
    magnified = np.abs(expected["max"]) + 1 if dtype == np.float64 else 1.0  # by lse of the parts, which are rounded
    for cuts in ((), (1,), (n_classes // 3, n_classes // 2)):
        merged = in_parts(x, target, cuts, temperature=temperature)
        assert_values_close(merged, expected, dtype, magnified=magnified)


def test_parts_of_rows_without_a_softmax_and_of_rows_not_read(backend, dtype):
    x = np.zeros((7, 9), dtype)
    x[0, 8], x[1, 4], x[2], x[3], x[4, :3], x[5, 3:6] = NAN, INF, -INF, NAN, -INF, -INF
    target = np.array([2, 1, 1, 77, 1, 7, -100])
    counts = np.array([True, True, True, False, True, True, False])
    merged = in_parts(x, target, (3, 6), counts)
    whole = rows.row_values(inputs.as_logits(x, -1), Rows(target, sample_weight=counts.astype(float)))
    for field in fields(whole):
        a, b = getattr(merged, field.name), getattr(whole, field.name)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12, err_msg=field.name)


def test_ties_across_parts_go_to_the_lower_class(backend):
    x = np.zeros((3, 6))
    merged = in_parts(x, np.array([0, 3, 5]), (2, 4))
    assert merged.argmax.tolist() == [0, 0, 0] and merged.rank.tolist() == [0, 3, 5]


def test_arguments_are_left_as_they_were(backend, rng):
    x, target = rng.standard_normal((4, 6)), rng.integers(0, 6, 4)
    before = x.copy(), target.copy()
    values = values_of(x, target)
    rows.merge_parts([replace(values)])
    in_parts(x, target, (3,))
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(target, before[1])
