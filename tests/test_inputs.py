"""Arrays of every kind go in; what does not fit is refused with what came, where, and what was wanted."""

import mmap

import ml_dtypes
import numpy as np
import pytest

import ce_fast as ce
from ce_fast import inputs

LOSS = ce.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


def misaligned(array):
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view = raw[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    assert not view.flags.aligned or array.itemsize == 1
    return view


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def memory_map(array):
    pages = mmap.mmap(-1, array.nbytes)
    view = np.frombuffer(pages, array.dtype).reshape(array.shape)
    view[...] = array
    return view


LAYOUTS = {
    "fortran": np.asfortranarray,
    "negative strides": lambda a: np.ascontiguousarray(a[tuple(slice(None, None, -1) for _ in a.shape)])[
        tuple(slice(None, None, -1) for _ in a.shape)
    ],
    "every third": lambda a: np.repeat(a, 3, -1)[..., ::3],
    "outer gap": lambda a: np.concatenate([a, a], 0)[: len(a)],
    "read-only": read_only,
    "misaligned": misaligned,
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()) if a.dtype.name != "bfloat16" else a,
    "broadcast": lambda a: np.broadcast_to(a[None], (1, *a.shape))[0],
    "memory map": memory_map,
    "subclass": lambda a: np.ma.asarray(a),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, axis", [((6, 9), None), ((2, 4, 3), 1), ((3, 1030), None)], ids=str)
def test_layout_changes_no_bit(backend, dtype, layout, shape, axis, rng):
    loss = ce.CrossEntropyLoss(reduction="none", label_smoothing=0.1, class_axis=axis)
    change = LAYOUTS[layout]
    logits = rng.standard_normal(shape).astype(dtype)
    outer = tuple(np.delete(shape, -1 if axis is None else axis))
    target = rng.integers(0, shape[-1 if axis is None else axis], outer)
    q, sample_weight = rng.random(shape).astype(dtype), rng.random(outer)
    for t, moved in ((target, change(target)), (q, change(q))):
        plain = loss.value_and_grad(logits, t, sample_weight)
        other = loss.value_and_grad(change(logits), moved, change(sample_weight))
        np.testing.assert_array_equal(plain[0], other[0])
        np.testing.assert_array_equal(plain[1].astype(float), np.asarray(other[1]).astype(float))


def test_kernels_get_aligned_native_arrays_only(rng):
    """A misaligned load is undefined behaviour, also where the CPU forgives it."""
    given, target, q, weight = rng.standard_normal((4, 3)), np.arange(4) % 3, rng.random((4, 3)), rng.random(4)
    for change in (LAYOUTS["misaligned"], LAYOUTS["byte-swapped"]):
        logits = inputs.as_logits(change(given), None)
        made = [logits.rows, inputs.as_targets(change(target), logits)[0], inputs.as_targets(change(q), logits)[1]]
        made += [inputs.as_sample_weight(change(weight), logits), inputs.as_class_weight(change(weight))]
        assert all(array.flags.aligned and array.dtype.isnative for array in made)


@pytest.mark.parametrize("layout", ["fortran", "negative strides", "every third", "misaligned", "byte-swapped"])
def test_out_of_any_layout_is_filled_and_returned(backend, dtype, layout, rng):
    logits, target = rng.standard_normal((6, 1030)).astype(dtype), rng.integers(0, 1030, 6)
    _, expected = LOSS.value_and_grad(logits, target)
    given = LAYOUTS[layout](logits)
    _, grad = LOSS.value_and_grad(given, target, out=given)  # in place
    assert grad is given
    np.testing.assert_array_equal(grad.astype(float), expected.astype(float))
    if layout != "byte-swapped":
        out = LAYOUTS[layout](np.zeros_like(logits))
        assert LOSS.value_and_grad(logits, target, out=out)[1] is out
        np.testing.assert_array_equal(out.astype(float), expected.astype(float))


def test_causal_shift_is_read_where_it_lies(backend, rng):
    """logits[:, :-1] against tokens[:, 1:]: two outer strides, no copy."""
    logits, tokens = rng.standard_normal((3, 5, 70)), rng.integers(0, 70, (3, 5))
    loss = ce.CrossEntropyLoss(reduction="none", class_axis=-1)
    value, grad = loss.value_and_grad(logits[:, :-1], tokens[:, 1:])
    copied = loss.value_and_grad(logits[:, :-1].copy(), tokens[:, 1:].copy())
    np.testing.assert_array_equal(value, copied[0])
    np.testing.assert_array_equal(grad, copied[1])
    loss.value_and_grad(logits[:, :-1], tokens[:, 1:], out=logits[:, :-1])  # another view of the same: in place
    np.testing.assert_array_equal(logits[:, :-1], copied[1])


@pytest.mark.parametrize("integer", INTEGERS)
@pytest.mark.parametrize("swapped", [False, True])
def test_targets_of_any_integer_dtype_are_read_natively(backend, integer, swapped, rng):
    logits, target = rng.standard_normal((20, 100)), rng.integers(0, 100, 20)
    given = target.astype(integer)
    given = given.astype(given.dtype.newbyteorder()) if swapped else given
    np.testing.assert_array_equal(LOSS(logits, given), LOSS(logits, target))
    _, grad = LOSS.value_and_grad(logits, given[::1])
    np.testing.assert_array_equal(grad, LOSS.value_and_grad(logits, target)[1])


def test_lists_integers_and_scalars_go_in(backend):
    assert ce.cross_entropy([[2, 0, -1], [0, 1, 0]], [0, 1]) == ce.cross_entropy(
        np.array([[2.0, 0, -1], [0, 1, 0]]), np.array([0, 1])
    )
    assert isinstance(ce.cross_entropy([1.0, 2.0], 0), float)
    assert ce.cross_entropy([1.0, 2.0], 0, reduction="none").shape == ()
    assert ce.logsumexp([1.0, 2.0]).shape == ()


def test_dlpack_goes_in_without_a_copy(backend):
    torch = pytest.importorskip("torch")
    logits = torch.arange(12.0).reshape(3, 4)
    assert ce.cross_entropy(logits, torch.tensor([0, 1, 2])) == ce.cross_entropy(logits.numpy(), [0, 1, 2])

    class Foreign:  # an array library of its own
        __dlpack__ = logits.__dlpack__
        __dlpack_device__ = logits.__dlpack_device__

    assert ce.cross_entropy(Foreign(), [0, 1, 2]) == ce.cross_entropy(logits.numpy(), [0, 1, 2])


X = np.zeros((4, 3))
T = np.array([0, 1, 2, 0])
BAD_DATA = [
    (TypeError, r"logits has dtype complex128; expected one of float64", lambda f: f(X + 0j, T)),
    (TypeError, r"logits has dtype bool", lambda f: f(X > 0, T)),
    (TypeError, r"logits has dtype <U1", lambda f: f([["a"]], [0])),
    (TypeError, r"logits has dtype object", lambda f: f(X.astype(object), T)),
    (TypeError, r"logits has dtype .*longdouble|float128", lambda f: f(X.astype(np.longdouble), T)),
    (ValueError, r"logits is a scalar", lambda f: f(1.0, 0)),
    (ValueError, r"no classes along axis 1", lambda f: f(np.zeros((4, 0)), T)),
    (ValueError, r"\(2, 3, 5\) needs class_axis: class_axis=1 .* 3 classes, or class_axis=-1 .* 5 classes",
     lambda f: f(np.zeros((2, 3, 5)), np.zeros((2, 5), int))),
    (ValueError, r"class indices has shape \(3,\); expected \(4,\)", lambda f: f(X, T[:3])),
    (ValueError, r"class indices has shape \(4, 3\); expected \(4,\)", lambda f: f(X, X.astype(int))),
    (ValueError, r"float64 has shape \(4,\); class probabilities need the shape \(4, 3\)", lambda f: f(X, T * 1.0)),
    (TypeError, r"target has dtype bool", lambda f: f(X, T > 0)),
    (TypeError, r"target has dtype <U1", lambda f: f(X, ["a"] * 4)),
    (IndexError, r"target\[2\] is 3; expected 0 <= target < 3 or ignore_index=-100", lambda f: f(X, [0, 1, 3, 0])),
    (IndexError, r"target\[0\] is -1;", lambda f: f(X, [-1, 1, 3, 0])),
    (IndexError, r"target\[3\] is 18446744073709551516;", lambda f: f(X, np.array([0, 0, 0, 2**64 - 100], np.uint64))),
    (ValueError, r"sample_weight has shape \(3,\); expected \(4,\)", lambda f: f(X, T, [1, 2, 3])),
    (ValueError, r"sample_weight\[1\] is -1.0", lambda f: f(X, T, [1, -1, 0, 0])),
    (ValueError, r"sample_weight\[3\] is nan", lambda f: f(X, T, [1, 1, 0, np.nan])),
    (TypeError, r"sample_weight has dtype complex128", lambda f: f(X, T, T + 0j)),
]  # fmt: skip


@pytest.mark.parametrize("error, message, call", BAD_DATA, ids=[m for _, m, _ in BAD_DATA])
@pytest.mark.parametrize("gradient", [False, True])
def test_bad_data_gets_an_error_that_says_what_came_and_what_was_wanted(backend, error, message, call, gradient):
    loss = ce.CrossEntropyLoss()
    with pytest.raises(error, match=message):
        call(loss.value_and_grad if gradient else loss)


def test_bad_target_is_named_by_its_position_and_leaves_logits_alone(backend):
    logits, target = np.zeros((2, 3, 4)), np.zeros((2, 4), int)
    target[1, 2] = 3
    with pytest.raises(IndexError, match=r"target\[1, 2\] is 3"):
        ce.CrossEntropyLoss(class_axis=1).value_and_grad(logits, target, out=logits)
    assert (logits == 0).all()


@pytest.mark.parametrize("axis", [3, -4])
def test_class_axis_out_of_range_is_named(axis):
    with pytest.raises(ValueError, match=rf"class_axis is {axis}; expected -3 <= class_axis < 3"):
        ce.cross_entropy(np.zeros((2, 3, 4)), np.zeros((2, 4), int), class_axis=axis)


BAD_OPTIONS = [
    (ValueError, "label_smoothing is 1.5; expected label_smoothing >= 0 and <= 1", {"label_smoothing": 1.5}),
    (ValueError, "label_smoothing is -0.1", {"label_smoothing": -0.1}),
    (ValueError, "label_smoothing is nan", {"label_smoothing": float("nan")}),
    (TypeError, "label_smoothing is '0.1'; expected a number", {"label_smoothing": "0.1"}),
    (ValueError, "reduction is 'avg'; expected one of", {"reduction": "avg"}),
    (ValueError, "reduction is None", {"reduction": None}),
    (ValueError, "smoothing is 'all'", {"smoothing": "all"}),
    (ValueError, "z_loss is -1.0", {"z_loss": -1}),
    (ValueError, "denominator is 'rows'", {"denominator": "rows"}),
    (ValueError, "denominator is 0.0; expected denominator > 0", {"denominator": 0}),
    (ValueError, "n_threads is 0; expected a positive integer", {"n_threads": 0}),
    (ValueError, "n_threads is -2", {"n_threads": -2}),
    (TypeError, "n_threads is 1.5", {"n_threads": 1.5}),
    (TypeError, "ignore_index is 'x'", {"ignore_index": "x"}),
    (ValueError, "ignore_index is 18446744073709551615; expected", {"ignore_index": 2**64 - 1}),
    (TypeError, "class_axis is 'last'", {"class_axis": "last"}),
    (ValueError, r"weight has shape \(2, 2\); expected \(n_classes,\)", {"weight": np.ones((2, 2))}),
    (ValueError, r"weight\[1\] is -1.0; expected finite values of at least 0", {"weight": [1, -1]}),
    (ValueError, r"weight\[0\] is inf", {"weight": [np.inf, 1]}),
    (TypeError, "weight has dtype <U1", {"weight": ["a"]}),
]


@pytest.mark.parametrize("error, message, options", BAD_OPTIONS, ids=[m for _, m, _ in BAD_OPTIONS])
def test_bad_options_raise_when_the_loss_is_made(error, message, options):
    with pytest.raises(error, match=message):
        ce.CrossEntropyLoss(**options)


def test_options_that_need_the_data_raise_when_it_is_called():
    with pytest.raises(ValueError, match=r"weight has 2 values; expected 3, the classes along axis 1"):
        ce.cross_entropy(X, T, [1.0, 2.0])
    others = ce.CrossEntropyLoss(label_smoothing=0.1, smoothing="others")
    with pytest.raises(ValueError, match="needs at least 2 classes"):
        others(np.zeros((2, 1)), [0, 0])
    with pytest.raises(ValueError, match="class probabilities"):
        others(X, X)


def test_class_weights_beyond_float32_need_float64_logits():
    for weight in ([1e39, 1.0, 1.0], [1.0, 1e-46, 1.0]):
        assert np.isfinite(ce.cross_entropy(X, T, weight, label_smoothing=0.1))
        with pytest.raises(ValueError, match=r"weight\[\d\] is .*; logits that are not float64 take 0, or magnitudes"):
            ce.cross_entropy(X.astype(np.float32), T, weight, label_smoothing=0.1)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="warmth"):
        ce.CrossEntropyLoss(warmth=2.0)


def overlapping(kind):
    """(logits, target, out) where out overlaps an argument."""
    raw = np.zeros(64)
    if kind == "shifted":
        return raw[:12].reshape(4, 3), T, raw[3:15].reshape(4, 3)
    if kind == "transposed":
        return raw[:9].reshape(3, 3), T[:3], raw[:9].reshape(3, 3).T
    if kind == "target":
        return np.zeros((4, 3)), raw[:12].reshape(4, 3), raw[:12].reshape(4, 3)
    if kind == "itself":
        return X, T, np.lib.stride_tricks.as_strided(raw, (4, 3), (8, 8))
    return X, T, np.lib.stride_tricks.as_strided(raw, (4, 3), (0, 8))


@pytest.mark.parametrize("kind", ["shifted", "transposed", "target", "itself", "stride 0"])
def test_out_that_overlaps_is_refused(kind):
    logits, target, out = overlapping(kind)
    with pytest.raises(ValueError, match=r"overlaps|share one place"):
        ce.CrossEntropyLoss().value_and_grad(logits, target, out=out)
    assert (out == 0).all()


def test_out_that_is_not_fit_is_refused():
    for out, message in [
        (np.zeros((3, 4)), r"out has shape \(3, 4\)"),
        (np.zeros((4, 3), np.float32), "dtype float32; expected shape .* float64"),
        (read_only(X), "read-only"),
    ]:
        with pytest.raises(ValueError, match=message):
            ce.CrossEntropyLoss().value_and_grad(X, T, out=out)
    with pytest.raises(TypeError, match="out is a list"):
        ce.CrossEntropyLoss().value_and_grad(X, T, out=[0])
    with pytest.raises(ValueError, match="out has"):  # integers became floats: in place cannot be
        logits = X.astype(int)
        ce.CrossEntropyLoss().value_and_grad(logits, T, out=logits)


def test_out_that_overlaps_what_another_library_owns_is_refused():
    torch = pytest.importorskip("torch")
    q = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="out overlaps target"):
        ce.CrossEntropyLoss().value_and_grad(np.zeros((4, 3)), q, out=q.numpy())


def test_masked_values_are_not_read_as_data():
    with pytest.raises(
        TypeError, match="logits is a masked array; expected a plain one, with its mask as sample_weight"
    ):
        ce.cross_entropy(np.ma.masked_greater(np.eye(3), 0), [0, 1, 2])


def test_what_numpy_cannot_read_is_named():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"logits is a torch.Tensor that NumPy cannot read"):
        ce.cross_entropy(torch.zeros(2, 3, requires_grad=True), [0, 1])


def test_more_threads_than_can_be_started_are_not_asked_for():
    logits = np.broadcast_to(np.zeros((1, 32768), np.float32), (2000, 32768))
    assert ce.CrossEntropyLoss(n_threads=10**6)(logits, np.zeros(2000, int)) == pytest.approx(np.log(32768))


def test_upstream_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"upstream has shape \(4,\) .* expected one number"):
        ce.CrossEntropyLoss().value_and_grad(X, T, upstream=np.ones(4))
    with pytest.raises(ValueError, match=r"upstream has shape \(\); expected \(4,\)"):
        ce.CrossEntropyLoss(reduction="none").value_and_grad(X, T, upstream=1.0)


def test_nll_loss_picks_minus_the_log_probability(dtype, rng):
    log_probs = np.log(rng.random((6, 5)) + 0.01).astype(dtype)
    target, weight, sample_weight = np.array([0, 4, -100, 2, 1, 3]), rng.random(5), rng.random(6)
    kept = target != -100
    w = sample_weight[kept] * weight[target[kept]]
    expected = -(w * log_probs.astype(float)[kept, target[kept]]).sum() / w.sum()
    loss = ce.NLLLoss(weight)
    value, grad = loss.value_and_grad(log_probs, target, sample_weight)
    assert value == pytest.approx(expected, rel=1e-12) and loss(log_probs, target, sample_weight) == value
    full = np.zeros((6, 5))
    full[kept, target[kept]] = -w / w.sum()
    np.testing.assert_array_equal(grad.astype(float), full.astype(dtype).astype(float))
    assert loss.value_and_grad(log_probs, target, out=log_probs)[1] is log_probs


def test_nll_loss_of_impossible_rows():
    log_probs = np.array([[-np.inf, 0.0], [np.nan, 0.0], [0.0, np.nan]])
    loss = ce.NLLLoss(reduction="none")
    np.testing.assert_array_equal(loss(log_probs, [0, -100, 0]), [np.inf, 0, 0])
    assert ce.NLLLoss(weight=[0.0, 1.0], reduction="none")(log_probs, [0, 0, 1])[0] == 0
    with pytest.raises(TypeError, match="class indices"):
        loss(log_probs, log_probs)
    _, grad = loss.value_and_grad(log_probs, [0, -100, 0], upstream=[1.0, np.nan, np.inf])
    np.testing.assert_array_equal(grad, [[-1, 0], [0, 0], [-np.inf, 0]])
    with pytest.raises(IndexError, match=r"target\[1\] is 2"):
        loss(log_probs, [0, 2, 0])


def test_bfloat16_that_was_saved_is_told_how_to_view_it():
    stored = np.zeros((2, 3), ml_dtypes.bfloat16).view("V2")  # as numpy.load gives it
    with pytest.raises(TypeError, match=r"logits has dtype \|V2 \(bfloat16 .* view it as ml_dtypes\.bfloat16\)"):
        ce.cross_entropy(stored, [0, 1])


def test_a_bfloat16_tensor_is_told_how_to_become_an_array():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"t\.view\(torch\.int16\)\.numpy\(\)\.view\(ml_dtypes\.bfloat16\)"):
        ce.row_stats(torch.zeros(2, 3, dtype=torch.bfloat16))
