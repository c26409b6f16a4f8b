"""Rows go many at a time, as lanes or along short rows, or one by one: whichever way, a row gets what it gets alone."""

import gc
import itertools
import os
import pickle
import threading
import warnings
from functools import lru_cache, partial

import numpy as np
import pytest

import ce_fast as ce
import reference
from conftest import DTYPES, VARIANTS, use
from tolerances import assert_grad_close, assert_loss_close

INF, NAN = np.inf, np.nan
# transposed, class-major in one tile and in several, along short rows, one by one
WAYS = {
    "pair": (2, -1), "few": (50, -1), "strided": (200, 0), "tiles": (600, 0), "short": (300, -1), "long": (4000, -1)
}  # fmt: skip
RULES = {
    "cross_entropy": (ce.CrossEntropyLoss, 0.0),
    "focal": (partial(ce.FocalLoss, gamma=2.0), 2.0),
    "poly": (partial(ce.PolyLoss, epsilon=1.5), 1.5),
    "generalized": (partial(ce.GeneralizedCrossEntropyLoss, q=0.7), 0.7),
}


@pytest.fixture(params=[v for v in VARIANTS if v != "numba"])
def compiled(request):
    with use(request.param):
        yield request.param


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request):
    return request.param


@lru_cache(maxsize=8)
def normal(n_rows, n_classes):
    return np.random.default_rng(n_rows * 2000 + n_classes).standard_normal((n_rows, n_classes))


def data(n_rows, n_classes, dtype=np.float32):
    """(logits, targets, some of them -100), the same for the same arguments."""
    target = np.arange(n_rows) * 7919 % n_classes
    target[3::7] = -100
    return (normal(n_rows, n_classes) * 4).astype(dtype), target


def run(logits, target, axis, sample_weight=None, loss=ce.CrossEntropyLoss, upstream=None, **options):
    """(row losses, gradient (n_rows, n_classes)), with the class axis where the way wants it."""
    given = logits if axis == -1 else np.ascontiguousarray(logits.T)
    fn = loss(reduction="none", class_axis=axis, **options)
    losses, grad = fn.value_and_grad(given, target, sample_weight, upstream=upstream)
    return losses, np.moveaxis(grad, axis, -1)


@lru_cache
def expected(n_rows, n_classes, dtype, **options):
    logits, target = data(n_rows, n_classes, dtype)
    return reference.cross_entropy(logits, target, reduction="none", **options)


def counts_beside(n_classes):
    """Numbers of rows: either side of a batch, and of a block of lanes."""
    return (1, 33, 129) if n_classes < 300 else (31,)


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("n_classes", [1, 2, 3, 5, 31, 32, 33, 65, 96, 97, 128, 255, 256, 257, 1025, 3072, 3073])
def test_every_way_agrees_with_the_oracle_either_side_of_its_bounds(compiled, dtype, n_classes, axis):
    for n_rows in counts_beside(n_classes):
        ref = expected(n_rows, n_classes, dtype)
        losses, grad = run(*data(n_rows, n_classes, dtype), axis)
        assert_loss_close(losses, ref.rows, dtype, ref.row_terms)
        assert_grad_close(grad, ref.grad, ref.terms, dtype)


@lru_cache
def weighted(n_classes, rule, options):
    """(logits, targets, options of the call, what the oracle says), with class, sample and upstream weights."""
    logits, target = data(70, n_classes, np.float64)
    rng = np.random.default_rng(3)
    weight, sample_weight, upstream = rng.random(n_classes), rng.random(70), rng.standard_normal(70)
    weight[rng.random(n_classes) < 0.3], sample_weight[::5] = 0, 0
    given = {"weight": weight, "sample_weight": sample_weight, "upstream": upstream} | dict(options)
    target[target < 0] = given.get("ignore_index", -100)
    ref = reference.cross_entropy(logits, target, reduction="none", rule=rule, param=RULES[rule][1], **given)
    return logits, target, given, ref


@pytest.mark.parametrize("option", [("temperature", 0.5), ("z_loss", 0.01), ("ignore_index", 1)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_every_way_agrees_with_the_oracle_for_every_rule(compiled, way, rule, option):
    n_classes, axis = way
    logits, target, given, ref = weighted(n_classes, rule, (option,))
    losses, grad = run(logits, target, axis, loss=RULES[rule][0], **given)
    assert_loss_close(losses, ref.rows, np.float64, ref.row_terms)
    assert_grad_close(grad, ref.grad, ref.terms, np.float64)


SMOOTHING = [(0.1, "uniform"), (1.0, "others")]  # the second has no mass at the target


@pytest.mark.parametrize("eps, smoothing", SMOOTHING)
@pytest.mark.parametrize(
    "n_classes, axis", [(2, -1), (3, 0), (33, -1), (96, -1), (97, -1), (256, 0), (300, -1), (600, 0)]
)
def test_smoothing_agrees_with_the_oracle_in_every_way(compiled, dtype, n_classes, axis, eps, smoothing):
    logits, target = data(70, n_classes, dtype)
    rng = np.random.default_rng(8)
    sample_weight, upstream = rng.random(70), rng.standard_normal(70)
    sample_weight[::5] = 0
    for options in ({}, {"temperature": 0.5, "sample_weight": sample_weight, "upstream": upstream}, {"z_loss": 0.01}):
        given = {"label_smoothing": eps, "smoothing": smoothing} | options
        ref = reference.cross_entropy(logits, target, reduction="none", **given)
        losses, grad = run(logits, target, axis, **given)
        assert_loss_close(losses, ref.rows, dtype, ref.row_terms)
        assert_grad_close(grad, ref.grad, ref.terms, dtype)
    ref = reference.cross_entropy(logits, target, label_smoothing=eps, smoothing=smoothing)
    loss = ce.CrossEntropyLoss(label_smoothing=eps, smoothing=smoothing, class_axis=axis)
    given = logits if axis == -1 else np.ascontiguousarray(logits.T)
    value, (grad, hess) = loss(given, target), loss.grad_and_hess(given, target)
    assert_loss_close(value, ref.value("mean"), dtype, ref.terms_of_value("mean"))
    assert_grad_close(np.moveaxis(grad, axis, -1), ref.grad, ref.terms, dtype)
    assert_grad_close(np.moveaxis(hess, axis, -1), ref.hess, ref.hess_terms, dtype)


@pytest.mark.parametrize("eps, smoothing", SMOOTHING)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_smoothed_losses_keep_their_digits_wherever_the_logits_lie(compiled, dtype, way, eps, smoothing):
    """Large, tiny, rising, falling, equal but for one; in batches of a kind, so that none goes alone for another."""
    n_classes, axis = way
    rng = np.random.default_rng(9)
    for size, offset in itertools.product((1e-30, 1e-3, 30.0, 1000.0), (0.0, -3000.0, 3000.0)):
        x = rng.random((20, n_classes)) * size
        x[:4], x[4:8], x[8:12] = np.sort(x[:4]), -np.sort(-x[4:8]), 0
        x[8:12, rng.integers(n_classes)] = size
        logits = (x + offset).astype(dtype)
        target = rng.integers(n_classes, size=20)
        target[::4], target[1::4] = logits[::4].argmax(-1), logits[1::4].argmin(-1)
        options = {"label_smoothing": eps, "smoothing": smoothing}
        ref = reference.cross_entropy(logits, target, reduction="none", **options)
        losses, grad = run(logits, target, axis, **options)
        assert_loss_close(losses, ref.rows, dtype, ref.row_terms)
        assert_grad_close(grad, ref.grad, ref.terms, dtype)


def test_the_slope_of_a_z_loss_keeps_its_digits_where_the_row_is_certain(compiled, way):
    """The gradient at a sure target is 2 z_loss lse, and lse the logit itself, however near 0."""
    n_classes, axis = way
    target = np.arange(40) % n_classes
    logits = np.full((40, n_classes), -800.0)
    logits[np.arange(40), target] = np.geomspace(1e-12, 1.0, 40)
    ref = reference.cross_entropy(logits, target, reduction="none", z_loss=0.01)
    _, grad = run(logits, target, axis, z_loss=0.01)
    assert_grad_close(grad, ref.grad, ref.terms, np.float64)


@pytest.mark.parametrize("below", [0, 15, 30, 100, 400, 3000, INF], ids=str)
@pytest.mark.parametrize("n_classes, axis", [(3, 0), (21, 0), (300, 0), (50, -1), (100, -1), (300, -1), (1000, -1)])
def test_first_classes_far_below_the_others_change_no_digit(compiled, dtype, n_classes, axis, below):
    """They are what the reference is taken from first. All rows count: strided tiles are read where they lie."""
    rng = np.random.default_rng(5)
    logits, few = rng.standard_normal((160, n_classes)), n_classes // 3
    target = rng.integers(few, n_classes, 160)
    logits[64::3, :few] -= below
    target[:64:5] = 0
    if np.isfinite(below):
        target[64::9] = 0
    logits = logits.astype(dtype)
    ref = reference.cross_entropy(logits, target, reduction="none")
    losses, grad = run(logits, target, axis)
    assert_loss_close(losses, ref.rows, dtype, ref.row_terms)
    assert_grad_close(grad, ref.grad, ref.terms, dtype)
    given = logits if axis == -1 else np.ascontiguousarray(logits.T)
    values = [ce.CrossEntropyLoss(class_axis=axis, n_threads=n)(given, target) for n in (1, 2)]
    assert values == [ce.CrossEntropyLoss(class_axis=axis).value_and_grad(given, target)[0]] * 2


def test_no_part_of_a_gradient_is_subnormal(compiled, way):
    """Logits spread over 200, of every exponent: one subnormal number takes as long as a hundred others."""
    n_classes, axis = way
    rng = np.random.default_rng(6)
    logits = (rng.random((256, n_classes)) * 200).astype(np.float32)
    _, grad = run(logits, rng.integers(0, n_classes, 256), axis, upstream=np.full(256, 1e-3))
    assert np.abs(grad[grad != 0]).min() >= np.finfo(np.float32).tiny


@pytest.mark.parametrize("shape, axis", [((4, 3, 2), 1), ((2, 300, 1), 1), ((5, 1000, 3), 1), ((3, 2, 70, 5, 3), 2)])
@pytest.mark.parametrize("layout", ["C", "F", "reversed", "stepped", "broadcast"])
def test_no_layout_changes_a_result(compiled, dtype, shape, axis, layout):
    rng = np.random.default_rng(7)
    logits = rng.standard_normal(shape).astype(dtype)
    given = {
        "C": lambda: logits,
        "F": lambda: np.asfortranarray(logits),
        "reversed": lambda: np.ascontiguousarray(logits[::-1, ::-1, ::-1])[::-1, ::-1, ::-1],
        "stepped": lambda: np.repeat(logits, 2, -1)[..., ::2],
        "broadcast": lambda: np.broadcast_to(logits[:1], shape),
    }[layout]()
    target = rng.integers(0, shape[axis], shape[:axis] + shape[axis + 1 :]).astype(np.int32)
    ref = reference.cross_entropy(np.array(given), target, reduction="none", class_axis=axis)
    loss = ce.CrossEntropyLoss(reduction="none", class_axis=axis)
    places = [None, np.empty(shape[::-1], dtype).T]
    for out in places if layout == "broadcast" else [*places, given.copy("K")]:
        losses, grad = loss.value_and_grad(given, target, out=out)
        assert_loss_close(losses, ref.rows, dtype, ref.row_terms)
        assert_grad_close(grad, ref.grad, ref.terms, dtype)
    if layout != "broadcast":
        assert loss.value_and_grad(given, target, out=given)[1] is given  # in place
        assert_grad_close(given, ref.grad, ref.terms, dtype)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["hard", "smoothed"])
@pytest.mark.parametrize("value", [NAN, INF, 5000.0, 1e30, -1e30, -INF], ids=str)
@pytest.mark.parametrize("where", ["target", "beside it", "row"])
def test_an_odd_row_changes_no_other(compiled, way, value, where, options):
    n_classes, axis = way
    odd, n_rows = 37, 70
    logits, target = data(n_rows, n_classes)
    place = {"target": target[odd], "beside it": (target[odd] + 1) % n_classes, "row": slice(None)}[where]
    logits[odd, place] = value
    others = np.arange(n_rows) != odd
    ref = expected(n_rows, n_classes, np.dtype(np.float32), **options)
    losses, grad = run(logits, target, axis, **options)
    assert_loss_close(losses[others], ref.rows[others], np.float32, ref.row_terms[others])
    assert_grad_close(grad[others], ref.grad[others], ref.terms[others], np.float32)
    if value != value or value == INF or (where == "row" and value == -INF):
        assert np.isnan(losses[odd]) and np.isnan(grad[odd]).all()
    else:
        one_by_one = {"weight": np.ones(n_classes)} if options else {}
        alone = run(logits[odd : odd + 1], target[odd : odd + 1], -1, **one_by_one, **options)
        np.testing.assert_allclose(losses[odd], alone[0][0], rtol=1e-6)
        np.testing.assert_allclose(grad[odd], alone[1][0], rtol=1e-6, atol=1e-37)
        assert not np.isnan(losses[odd]) and not np.isnan(grad[odd]).any()


def test_rows_that_do_not_count_are_not_read(compiled, dtype, way):
    n_classes, axis = way
    logits, target = data(70, n_classes, dtype)
    sample_weight, upstream = np.ones(70), np.full(70, 2.0)
    sample_weight[5::9] = 0
    out = (target < 0) | (sample_weight == 0)
    for eps, value in itertools.product((0, 0.1), (NAN, INF, -INF)):
        logits[out], upstream[out] = 0, 0
        clean = run(logits, target, axis, sample_weight, upstream=upstream, label_smoothing=eps)
        logits[out], upstream[out] = value, value
        target[sample_weight == 0] = n_classes + 5  # nor is it a bad target
        losses, grad = run(logits, target, axis, sample_weight, upstream=upstream, label_smoothing=eps)
        np.testing.assert_array_equal(losses, clean[0])
        np.testing.assert_array_equal(grad, clean[1])
        assert (losses[out] == 0).all() and (grad[out] == 0).all()


@pytest.mark.parametrize("bad", [-1, None, 30000], ids=["negative", "n_classes", "far"])
@pytest.mark.parametrize("places", [(0,), (31, 32), (69, 127), (128,), (64, 0), (33, 129)], ids=str)
def test_the_first_bad_target_is_named_by_its_place(compiled, way, places, bad):
    n_classes, axis = way
    logits, target = data(130, n_classes)
    target = target.astype(np.int16)
    target[list(places)] = n_classes if bad is None else bad
    given = logits if axis == -1 else np.ascontiguousarray(logits.T)
    for reduction in ("mean", "none"):
        loss = ce.CrossEntropyLoss(class_axis=axis, reduction=reduction, n_threads=2)
        for call in (loss, loss.value_and_grad, partial(loss.value_and_grad, out=given)):
            before = given.copy()
            with pytest.raises(IndexError, match=rf"target\[{min(places)}\] is {target[min(places)]}\b"):
                call(given, target)
            np.testing.assert_array_equal(given, before)


@pytest.mark.parametrize("rule", RULES)
def test_the_value_has_the_same_bits_with_a_gradient_and_without(compiled, dtype, way, rule):
    n_classes, axis = way
    logits, target = data(70, n_classes, dtype)
    given = logits if axis == -1 else np.ascontiguousarray(logits.T)
    for options in ({}, {"z_loss": 0.01, "temperature": 2.0}, {"reduction": "none"}, {"label_smoothing": 0.1}):
        loss = RULES[rule][0](class_axis=axis, **options)
        np.testing.assert_array_equal(loss(given, target), loss.value_and_grad(given, target)[0])


def test_every_way_gives_the_same_bits_for_any_number_of_threads(compiled, dtype, way):
    n_classes, axis = way
    logits, target = data(200000 // n_classes, n_classes, dtype)
    given = logits if axis == -1 else np.ascontiguousarray(logits.T)
    for eps in (0, 0.1):
        results = []
        for n_threads in (1, 2, 3, 7):
            loss = ce.CrossEntropyLoss(class_axis=axis, label_smoothing=eps, n_threads=n_threads)
            value, grad = loss.value_and_grad(given, target)
            results.append((value, grad.tobytes()))
        assert all(result == results[0] for result in results)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("offset", [0, 3])
def test_a_gradient_past_the_caches_has_the_rows_of_a_small_one(compiled, dtype, way, offset):
    n_classes, axis = way
    n_rows = (9 << 20) // (n_classes * dtype.itemsize)
    logits, target = data(n_rows, n_classes, dtype)
    given = logits if axis == -1 else np.ascontiguousarray(logits.T)
    loss = ce.CrossEntropyLoss(class_axis=axis, reduction="sum", n_threads=2)
    guarded = np.full(given.size + 8, 7.0, dtype)
    out = guarded[offset : offset + given.size].reshape(given.shape)
    grad = np.moveaxis(loss.value_and_grad(given, target, out=out)[1], axis, -1)
    assert (guarded[:offset] == 7).all() and (guarded[offset + given.size :] == 7).all()
    for rows in (slice(0, 100), slice(n_rows // 2, n_rows // 2 + 33), slice(n_rows - 100, n_rows)):
        _, part = run(logits[rows], target[rows], axis)
        np.testing.assert_array_equal(grad[rows], part)


LOGITS, TARGET = np.zeros((1024, 700), np.float32), np.zeros(1024, np.int64)  # 2.7 MiB


def gradient(logits=LOGITS):
    with ce.use_backend("compiled"):
        return ce.CrossEntropyLoss(n_threads=1).value_and_grad(logits, TARGET[: len(logits)])[1]


def assert_apart(arrays):
    for a, b in itertools.combinations(arrays, 2):
        assert not np.shares_memory(a, b)


def test_a_new_gradient_lies_where_a_freed_one_lay_and_never_where_one_lives():
    exact, living = gradient(), []
    for i in range(12):
        grad = gradient()
        place = grad.ctypes.data
        np.testing.assert_array_equal(grad, exact)
        grad[:] = i
        del grad
        living.append(gradient())
        assert living[-1].ctypes.data == place
        living[-1][:] = i
        if i % 3 == 2:
            living.pop(0)
        assert_apart(living)
    assert [grad[5, 5] for grad in living] == list(range(4, 12))
    assert all((grad == grad[0, 0]).all() for grad in living)


def test_a_view_keeps_its_gradient():
    view = gradient()[1::2, 3:]
    exact = view.copy()
    others = [gradient() for _ in range(3)]
    for other in others:
        other[:] = 7
    assert_apart([view, *others])
    np.testing.assert_array_equal(view, exact)


@pytest.mark.parametrize("n_rows", [0, 1, 400, 1000, 1025, 3000, 20000])
def test_a_resized_gradient_keeps_its_elements_and_leaves_no_false_size(n_rows):
    exact, grad = gradient(), gradient()
    grad.resize((n_rows, 700), refcheck=False)
    common = min(n_rows, 1024)
    np.testing.assert_array_equal(grad[:common], exact[:common])
    assert (grad[common:] == 0).all()
    del grad  # its memory has another size than it was made with
    for logits in (LOGITS, np.zeros((1000, 700), np.float32), LOGITS):
        other = gradient(logits)
        other[:] = 7
        assert_apart([exact, other])
        del other
    np.testing.assert_array_equal(gradient(), exact)


def test_a_gradient_is_an_ordinary_array():
    module = getattr(np, "_core", None) or np.core
    handler_name = module.multiarray.get_handler_name
    before = handler_name()
    grad = gradient()
    assert handler_name(grad) == "ce_fast" and handler_name() == before == handler_name(np.empty(1 << 20))
    assert type(grad) is np.ndarray and grad.base is None
    for flag in ("OWNDATA", "WRITEABLE", "ALIGNED", "C_CONTIGUOUS"):
        assert grad.flags[flag]
    for copy in (grad.copy(), pickle.loads(pickle.dumps(grad))):
        np.testing.assert_array_equal(copy, grad)
        assert_apart([copy, grad])
    grad.shape = (700, 1024)
    grad.dtype = np.uint8
    del grad
    gc.collect()
    assert gradient().shape == LOGITS.shape


def test_gradients_of_several_threads_are_apart():
    kept, failures = [], []

    def work(tag):
        mine = []
        for i in range(12):
            grad = gradient()
            grad[:] = tag * 100 + i
            if i % 4 == 0:
                mine.append((grad, tag * 100 + i))
            elif not (grad == tag * 100 + i).all():
                failures.append(tag)
            del grad
        kept.extend(mine)

    workers = [threading.Thread(target=work, args=(tag,)) for tag in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures and len(kept) == 12
    assert all((grad == value).all() for grad, value in kept)
    assert_apart([grad for grad, _ in kept])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_a_forked_child_and_its_parent_have_gradients_of_their_own():
    exact, living = gradient(), gradient()
    living[:] = 3
    gradient()[:] = 9  # freed: both take its memory next
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads about
        child = os.fork()
    if child == 0:
        good = False
        try:
            grads = [gradient(), gradient()]
            good = all(np.array_equal(grad, exact) for grad in grads) and bool((living == 3).all())
            for grad in (*grads, living):
                grad[:] = 5
        finally:
            os._exit(0 if good else 1)
    grad = gradient()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    np.testing.assert_array_equal(grad, exact)
    assert (living == 3).all()
