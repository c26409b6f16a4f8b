"""Cross-entropy of hidden @ classifier.T + bias: against the oracle, block by block, and in bounded memory.

Hidden states, classifiers and biases are small multiples of 1/4 here: their logits are exact in every dtype, so that
losses are held to the bounds of losses, and gradients to those and the rounding of a sum of so many products.
"""

import subprocess
import sys

import numpy as np
import pytest

import ce_fast as ce
import reference
from ce_fast import linear
from conftest import DTYPES
from tolerances import assert_loss_close, assert_product_close

ONE_ROW = {"BLOCK_BYTES": 1, "CLASS_BYTES": 1}
MIB = 2**20

CASES = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "upstream": {"reduction": "none", "upstream": True},
    "ignore": {"ignore_index": 1},
    "weight": {"weight": True, "bias": True},
    "smoothing": {"label_smoothing": 0.2, "weight": True},
    "others": {"label_smoothing": 0.3, "smoothing": "others", "bias": True},
    "softcap": {"softcap": 3.0, "temperature": 2.0},
    "z_loss": {"z_loss": 0.01, "weight": True, "sample_weight": True},
    "temperature": {"temperature": 0.5, "bias": True},
    "sample_weight": {"sample_weight": True, "bias": True, "ignore_index": 2},
    "count": {"sample_weight": True, "denominator": "count"},
    "number": {"denominator": 7.0},
    "soft": {"soft": True, "bias": True},
    "soft_all": {"soft": True, "sample_weight": True, "label_smoothing": 0.1, "weight": True, "z_loss": 0.01},
    "soft_none": {"soft": True, "reduction": "none", "softcap": 2.0, "upstream": True},
}


def quarters(rng, shape, dtype):
    return (rng.integers(-6, 7, shape) / 4).astype(dtype)


def make(rng, dtype, outer=(5, 7), n_classes=11, n_features=9, *, bias=False, soft=False, sample_weight=False):
    """(hidden, classifier, target, bias, sample_weight)"""
    hidden, classifier = quarters(rng, (*outer, n_features), dtype), quarters(rng, (n_classes, n_features), dtype)
    if soft:
        target = rng.multinomial(8, np.full(n_classes, 1 / n_classes), outer) / 8  # exact in every dtype
    else:
        target = rng.integers(0, n_classes, outer)
    some = rng.integers(0, 3, outer) / 2 if sample_weight else None
    return hidden, classifier, target, quarters(rng, n_classes, dtype) if bias else None, some


def logits_of(hidden, classifier, bias):
    """Exact, in the compute dtype."""
    dtype = np.float64 if hidden.dtype == np.float64 else np.float32
    wide = hidden.astype(np.longdouble) @ classifier.astype(np.longdouble).T
    wide += 0 if bias is None else bias.astype(np.longdouble)
    assert (wide.astype(dtype) == wide).all()
    return wide.astype(dtype)


def by_numpy(hidden, classifier, target, bias, sample_weight, *, upstream, **options):
    """Value and gradients; a call without gradients gives the same value."""
    loss = ce.LinearCrossEntropyLoss(**options)
    value, grads = loss.value_and_grad(hidden, classifier, target, bias, sample_weight, upstream=upstream)
    np.testing.assert_array_equal(value, loss(hidden, classifier, target, bias, sample_weight))
    return value, grads


def check(hidden, classifier, target, bias=None, sample_weight=None, *, by=by_numpy, upstream=None, **options):
    """Value and gradients equal the oracle's."""
    logits = logits_of(hidden, classifier, bias)
    expected = reference.cross_entropy(logits, target, sample_weight=sample_weight, upstream=upstream, **options)
    reduction = options.get("reduction", "mean")
    value, grads = by(hidden, classifier, target, bias, sample_weight, upstream=upstream, **options)
    assert_loss_close(value, expected.value(reduction), logits.dtype, expected.terms_of_value(reduction))

    n_classes, n_features = classifier.shape
    g, terms = expected.grad.reshape(-1, n_classes), np.maximum(expected.terms, np.abs(expected.grad))
    terms, h, w = terms.reshape(-1, n_classes), hidden.reshape(-1, n_features).astype(np.longdouble), classifier
    w = w.astype(np.longdouble)
    by_hidden = (g @ w).reshape(hidden.shape), (terms @ np.abs(w)).reshape(hidden.shape), n_classes
    by_classifier = g.T @ h, terms.T @ np.abs(h), len(g)
    given = {"hidden": (hidden, by_hidden), "classifier": (classifier, by_classifier)}
    if bias is not None:
        given["bias"] = bias, (g.sum(0), terms.sum(0), len(g))
    else:
        assert grads.bias is None
    for name, (array, (exact, of, n_terms)) in given.items():
        grad = getattr(grads, name)
        assert grad.dtype == array.dtype and grad.shape == array.shape
        assert_product_close(grad, exact, of, n_terms, array.dtype)


def check_case(rng, dtype, name, by=by_numpy):
    options = dict(CASES[name])
    kinds = {kind: options.pop(kind, False) for kind in ("bias", "soft", "sample_weight")}
    data = make(rng, dtype, outer=(35,), **kinds)
    if options.pop("weight", False):
        options["weight"] = rng.integers(2, 7, len(data[1])) / 4
    if options.pop("upstream", False):
        options["upstream"] = rng.integers(-6, 7, data[0].shape[:-1]) / 4
    check(*data, by=by, **options)


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_those_of_the_logits(name, dtype, backend, rng):
    check_case(rng, dtype, name)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "sizes", [ONE_ROW, {"BLOCK_BYTES": 700, "CLASS_BYTES": 150}, {"BLOCK_BYTES": 2000}], ids=["one_row", "some", "more"]
)
def test_blocks_of_any_size_give_the_same(sizes, name, dtype, rng, monkeypatch):
    for constant, n_bytes in sizes.items():
        monkeypatch.setattr(linear, constant, n_bytes)
    check_case(rng, dtype, name)


@pytest.mark.parametrize("outer", [(), (1,), (3, 1, 4), (300,)])
@pytest.mark.parametrize("n_classes, n_features", [(1, 5), (40, 1), (1030, 3)])
def test_any_shape_of_rows_and_any_number_of_classes_and_features(outer, n_classes, n_features, dtype, rng):
    check(*make(rng, dtype, outer, n_classes, n_features, bias=True))


def test_blocks_of_rows_share_a_bounded_place_and_are_of_like_size():
    w, dtype = np.empty((32000, 512), np.float32), np.dtype(np.float32)
    rows = linear._block_rows(4096, w, dtype)
    assert rows * 33024 * 4 <= linear.BLOCK_BYTES and -(-4096 // rows) * rows - 4096 < -(-4096 // rows)
    large = np.broadcast_to(np.float32(0), (152_064, 8192))
    assert linear._block_rows(1 << 20, large, dtype) > 400  # or reading and adding 5 GB would cost more than products
    assert linear._block_rows(1, w, dtype) == linear._block_rows(0, w, dtype) == 1


@pytest.mark.parametrize("sizes", [{}, ONE_ROW])
@pytest.mark.parametrize("by", ["ignore_index", "mask"])
def test_rows_that_do_not_count_leak_nothing(by, sizes, dtype, rng, monkeypatch):
    for constant, n_bytes in sizes.items():
        monkeypatch.setattr(linear, constant, n_bytes)
    hidden, classifier, target, bias, _ = make(rng, dtype, (23,), bias=True)
    counts = rng.random(23) < 0.6
    loss, mask = ce.LinearCrossEntropyLoss(), counts if by == "mask" else None
    kept, of_kept = loss.value_and_grad(hidden[counts], classifier, target[counts], bias)
    hidden[~counts] = rng.choice([np.nan, np.inf, -np.inf], (sum(~counts), 1))
    target[~counts] = -100
    value, grads = loss.value_and_grad(hidden, classifier, target, bias, mask)
    assert value == kept
    assert (grads.hidden[~counts] == 0).all()
    for mine, theirs in ((grads.hidden[counts], of_kept.hidden), (grads.classifier, of_kept.classifier)):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(grads.bias, of_kept.bias)


@pytest.mark.parametrize("target", [np.full(4, -100), np.zeros(0, int)], ids=["ignored", "no_rows"])
def test_nothing_that_counts_is_a_mean_of_nan_a_sum_of_0_and_gradients_of_0(target, dtype):
    hidden, classifier = np.full((len(target), 3), np.nan, dtype), np.ones((5, 3), dtype)
    assert np.isnan(ce.linear_cross_entropy(hidden, classifier, target))
    value, grads = ce.LinearCrossEntropyLoss(reduction="sum").value_and_grad(hidden, classifier, target, np.ones(5))
    assert value == 0 and all((grad == 0).all() for grad in grads)


def test_nan_in_a_row_that_counts_is_nan_in_its_own_loss_and_gradient_alone(dtype, rng):
    hidden, classifier, target, *_ = make(rng, dtype, (6,))
    hidden[2, 1] = np.nan
    value, grads = ce.LinearCrossEntropyLoss(reduction="none").value_and_grad(hidden, classifier, target)
    of_row = np.arange(6) == 2
    np.testing.assert_array_equal(np.isnan(value), of_row)
    np.testing.assert_array_equal(np.isnan(grads.hidden).any(1), of_row)


@pytest.mark.parametrize("sizes", [{}, ONE_ROW])
def test_layouts_of_any_strides_and_byte_orders_give_the_same(sizes, dtype, rng, monkeypatch):
    for constant, n_bytes in sizes.items():
        monkeypatch.setattr(linear, constant, n_bytes)
    hidden, classifier, target, bias, _ = make(rng, dtype, (4, 6), bias=True)
    loss = ce.LinearCrossEntropyLoss()
    value, grads = loss.value_and_grad(hidden, classifier, target, bias)
    layouts = [np.asfortranarray, lambda a: np.repeat(a, 2, -1)[..., ::2], lambda a: a[::-1].copy()[::-1]]
    if dtype.name != "bfloat16":
        layouts.append(lambda a: a.astype(dtype.newbyteorder(">")))
        layouts.append(lambda a: np.frombuffer(b"\0" + a.tobytes(), a.dtype, offset=1).reshape(a.shape))
    for layout in layouts:
        other, others = loss.value_and_grad(layout(hidden), layout(classifier), target[:], layout(bias))
        assert other == pytest.approx(value, rel=1e-6)
        for mine, theirs in zip(others, grads, strict=True):
            assert mine.dtype.isnative and mine.dtype == theirs.dtype
            np.testing.assert_allclose(mine.astype(float), theirs.astype(float), rtol=2e-2, atol=1e-3)


def test_dtypes_may_differ_and_gradients_have_those_of_their_arrays(rng):
    hidden, classifier, target, bias, _ = make(rng, np.float64, bias=True)
    exact, of_exact = ce.LinearCrossEntropyLoss().value_and_grad(hidden, classifier, target, bias)
    mixed = hidden.astype(DTYPES[3]), classifier.astype(np.float16), target.astype(np.uint8), bias.astype(np.float32)
    value, grads = ce.LinearCrossEntropyLoss().value_and_grad(*mixed)
    assert value == pytest.approx(exact, rel=1e-6)
    assert [grad.dtype for grad in grads] == [DTYPES[3], np.float16, np.float32]
    np.testing.assert_allclose(grads.bias, of_exact.bias, rtol=1e-4, atol=1e-7)
    value = ce.linear_cross_entropy(hidden, classifier.astype(np.float32), target, bias=bias.astype(DTYPES[3]))
    assert value == exact  # float64 products


def test_lists_and_integers_are_taken_as_float64():
    hidden, classifier = [[1, 0], [0, 2]], [[1, 0], [0, 1], [-1, -1]]
    value, grads = ce.LinearCrossEntropyLoss().value_and_grad(hidden, classifier, [0, 1], [0, 0, 1])
    assert value == ce.cross_entropy([[1, 0, 0], [0, 2, -1]], [0, 1])
    assert [grad.dtype for grad in grads] == [np.float64] * 3


@pytest.mark.parametrize("sizes", [{}, ONE_ROW])
def test_a_read_only_memmap_is_a_classifier_like_any_other(sizes, dtype, rng, tmp_path, monkeypatch):
    for constant, n_bytes in sizes.items():
        monkeypatch.setattr(linear, constant, n_bytes)
    hidden, classifier, target, *_ = make(rng, dtype)
    (tmp_path / "classifier").write_bytes(b"head" + classifier.tobytes())
    mapped = np.memmap(tmp_path / "classifier", dtype, "r", offset=4, shape=classifier.shape)
    value, grads = ce.LinearCrossEntropyLoss().value_and_grad(hidden, mapped, target)
    expected, of_array = ce.LinearCrossEntropyLoss().value_and_grad(hidden, classifier, target)
    assert value == pytest.approx(expected, rel=1e-6)
    assert type(grads.classifier) is np.ndarray and grads.classifier.flags.writeable
    np.testing.assert_allclose(grads.classifier.astype(float), of_array.classifier.astype(float), rtol=2e-2, atol=1e-3)
    assert mapped.tobytes() == classifier.tobytes()


def test_a_16_bit_gradient_is_added_up_wide_and_rounded_once(rng, monkeypatch):
    """Each of 512 rows adds less than half a unit of what is there: a 16-bit sum would stop short of it."""
    for constant, n_bytes in ONE_ROW.items():
        monkeypatch.setattr(linear, constant, n_bytes)
    hidden, classifier = np.ones((512, 1), DTYPES[3]), np.zeros((2, 1), DTYPES[3])
    loss = ce.LinearCrossEntropyLoss(reduction="sum")
    grads = loss.value_and_grad(hidden, classifier, np.zeros(512, int), np.zeros(2, DTYPES[3]))[1]
    assert grads.classifier.astype(float).tolist() == [[-256], [256]]
    assert grads.bias.astype(float).tolist() == [-256, 256]


def test_results_have_the_same_bits_for_any_number_of_threads(rng):
    data = make(rng, np.float32, (700,), 900, bias=True)
    value, grads = ce.LinearCrossEntropyLoss(n_threads=1, label_smoothing=0.1).value_and_grad(*data)
    for n_threads in (2, 3, 8):
        other, others = ce.LinearCrossEntropyLoss(n_threads=n_threads, label_smoothing=0.1).value_and_grad(*data)
        assert other == value
        for mine, theirs in zip(others, grads, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_the_function_is_the_loss_of_its_options(rng):
    hidden, classifier, target, bias, some = make(rng, np.float32, bias=True, sample_weight=True)
    options = {"weight": rng.random(11), "ignore_index": 3, "reduction": "sum", "label_smoothing": 0.1}
    options |= {"temperature": 2.0, "softcap": 5.0, "z_loss": 0.1, "n_threads": 1}
    value = ce.linear_cross_entropy(hidden, classifier, target, bias=bias, sample_weight=some, **options)
    assert value == ce.LinearCrossEntropyLoss(**options)(hidden, classifier, target, bias, some)
    rows = ce.linear_cross_entropy(hidden, classifier, target, reduction="none")
    assert rows.shape == target.shape and rows.dtype == np.float32


def test_the_first_bad_target_is_named_before_anything_is_computed(rng, monkeypatch):
    hidden, classifier, target, *_ = make(rng, np.float32)
    monkeypatch.setattr(linear.Products, "put", lambda *_: pytest.fail("a product was made"))
    target[3, 2], target[4, 6] = 11, -7
    with pytest.raises(IndexError, match=r"target\[3, 2\] is 11; expected 0 <= target < 11 or ignore_index=-100"):
        ce.linear_cross_entropy(hidden, classifier, target)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"hidden": 1.0}, ValueError, "hidden is a scalar"),
        ({"hidden": np.zeros((5, 7, 8))}, ValueError, r"classifier has shape \(11, 9\); expected \(n_classes, 8\)"),
        ({"hidden": np.zeros((5, 7, 9), complex)}, TypeError, "hidden has dtype complex128"),
        ({"classifier": np.zeros(9)}, ValueError, r"classifier has shape \(9,\)"),
        ({"classifier": np.zeros((0, 9))}, ValueError, "at least 1 class"),
        ({"classifier": np.zeros((9, 11))}, ValueError, r"classifier has shape \(9, 11\); expected \(n_classes, 9\)"),
        ({"classifier": np.zeros((11, 9), bool)}, TypeError, "classifier has dtype bool"),
        ({"bias": np.zeros(9)}, ValueError, r"bias has shape \(9,\); expected \(11,\)"),
        ({"target": np.zeros(35, int)}, ValueError, r"target of class indices has shape \(35,\); expected \(5, 7\)"),
        ({"target": np.zeros((5, 7))}, ValueError, r"class probabilities need the shape \(5, 7, 11\)"),
        ({"sample_weight": np.ones(5)}, ValueError, r"sample_weight has shape \(5,\); expected \(5, 7\)"),
        ({"sample_weight": np.full((5, 7), -1.0)}, ValueError, r"sample_weight\[0, 0\] is -1.0"),
        ({"upstream": np.ones(3)}, ValueError, r"upstream has shape \(3,\)"),
    ],
)
def test_what_does_not_fit_is_an_error_that_says_what_would(change, error, words, rng):
    names = ("hidden", "classifier", "target", "bias", "sample_weight")
    given = dict(zip(names, make(rng, np.float32), strict=True)) | change
    with pytest.raises(error, match=words):
        ce.LinearCrossEntropyLoss().value_and_grad(**given)


@pytest.mark.parametrize(
    "options, error",
    [({"temperature": 0.0}, ValueError), ({"reduction": "all"}, ValueError), ({"class_axis": 1}, TypeError)],
)
def test_options_are_checked_when_the_loss_is_made(options, error):
    with pytest.raises(error):
        ce.LinearCrossEntropyLoss(**options)


def test_class_weights_are_one_a_class(rng):
    with pytest.raises(ValueError, match="weight has 3 values; expected 11"):
        ce.linear_cross_entropy(*make(rng, np.float32)[:3], weight=[1, 2, 3])


def test_it_has_no_hessian():
    with pytest.raises(NotImplementedError, match="CrossEntropyLoss"):
        ce.LinearCrossEntropyLoss().grad_and_hess([[1.0]], [[1.0]], [0])


GROWTH = """
import sys
import numpy as np, ml_dtypes
import ce_fast as ce
from ce_fast import measure
dtype, call = sys.argv[1:]
def made(n_rows, n_classes, n_features):
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal(shape, np.float32) for shape in ((n_rows, n_features), (n_classes, n_features)))
    hidden, classifier = (array.astype(dtype) for array in arrays)
    loss, target = ce.LinearCrossEntropyLoss(n_threads=2), rng.integers(0, n_classes, n_rows)
    return lambda: getattr(loss, call)(hidden, classifier, target)
made(64, 64, 32)()
print(measure.peak_growth(made(4096, 20000, 128)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("call", ["__call__", "value_and_grad"])
def test_beyond_gradients_it_takes_a_block_of_rows_and_one_of_classes(call, dtype):
    done = subprocess.run([sys.executable, "-c", GROWTH, dtype, call], capture_output=True, text=True, check=True)
    grown, logits = int(done.stdout), 4096 * 20000 * 4
    gradients = (4096 + 20000) * 128 * 4 if call == "value_and_grad" else 0
    gradients *= 1.5 if dtype == "bfloat16" else 1  # its sum in float32, and itself
    blas = 10 * MIB  # places of its own, which come with the first large product
    most = linear.BLOCK_BYTES + 2 * linear.CLASS_BYTES + gradients + blas
    assert grown < most < logits / 2.5
