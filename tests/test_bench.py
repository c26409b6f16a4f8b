"""The benchmarks and the demo, on tiny sizes: what they compute is right. No test here looks at a clock."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ce_fast import bench, demo, workloads

TINY = {1: (50,), 2: (44, 11), 4: (2, 5, 4, 3)}  # by the number of dimensions; rows enough for every label to occur
TOLERANCE = {"bfloat16": 1e-2}  # torch's log-softmax is bfloat16 there; all else is float32 or float64
ASV = Path(__file__).parents[1] / "asv_bench"


def tiny_calls(workload):
    calls = workload.setup(TINY[len(workload.shape)], 1)
    if workloads.OURS not in calls:
        pytest.skip("what it needs is not installed")
    return calls


def parts(result):
    """Loss and gradient as float64 arrays, whoever made them."""
    results = result if isinstance(result, tuple) else (result,)
    widened = (part.double() if hasattr(part, "double") else part for part in results)  # NumPy reads no bfloat16 tensor
    return [np.asarray(part, np.float64) for part in widened]


def row(ours=1.0, peer=4.0, at_least=3.0):
    return bench.Row("forward", "forward [2, 5]", (2, 5), workloads.TORCH, ours, peer, at_least, 8.0)


def report(*rows, memory=None):
    return bench.Report(rows, memory, bench.machine())


@pytest.mark.parametrize("workload", workloads.WORKLOADS, ids=lambda w: w.name)
def test_ours_and_every_peer_compute_the_same(workload):
    calls = tiny_calls(workload)
    calls.pop(workloads.READ, None)
    ours, *others = [parts(call()) for call in (calls.pop(workloads.OURS), *calls.values())]
    assert np.isfinite(ours[0]).all() and np.all(ours[0] > 0)
    for other in others:
        assert len(other) == len(ours)
        for mine, theirs in zip(ours, other, strict=True):
            rtol = TOLERANCE.get(workload.name, 1e-5)
            np.testing.assert_allclose(theirs, mine, rtol=rtol, atol=rtol * np.abs(mine).max())


@pytest.mark.parametrize("workload", workloads.WORKLOADS, ids=lambda w: w.name)
def test_a_workload_offers_every_peer_it_names_that_is_installed(workload):
    calls = tiny_calls(workload)
    module = {workloads.TORCH: "torch", workloads.SKLEARN: "sklearn", workloads.JAX: "jax", workloads.READ: "numpy"}
    module[workloads.CHUNKED] = "torch"
    assert {peer.name for peer in workload.peers if workloads.installed(module[peer.name])} <= set(calls)


def test_reading_once_looks_at_every_logit():
    calls = workloads.FORWARD.setup((44, 11), 1)
    assert float(calls[workloads.READ]()) == workloads.make_logits((44, 11))[0].max()


def test_names_are_unique_and_quick_keeps_the_columns():
    assert len(workloads.BY_NAME) == len(workloads.WORKLOADS)
    assert bench.MEMORY not in workloads.BY_NAME
    for workload in workloads.WORKLOADS:
        assert workload.quick_shape[1:] == workload.shape[1:]
        assert workload.quick_shape[0] <= workload.shape[0]


def test_the_input_is_the_same_at_every_call():
    for made in zip(workloads.make_logits((5, 7)), workloads.make_logits((5, 7)), strict=True):
        np.testing.assert_array_equal(*made)


def test_measure_gives_one_row_for_each_peer():
    rows = bench.measure(workloads.FORWARD, (8, 11), repeats=2)
    assert [row.peer for row in rows] == [peer.name for peer in workloads.FORWARD.peers]
    for row in rows:
        assert row.ours_seconds > 0 and row.work == "forward float32 [8, 11]"
        assert row.peer_seconds is None or row.ratio == row.peer_seconds / row.ours_seconds


def test_a_peer_that_is_not_installed_gives_a_dash_and_no_verdict(monkeypatch):
    monkeypatch.setattr(workloads, "installed", lambda module: False)
    rows = [row for w in workloads.WORKLOADS for row in bench.measure(w, TINY[len(w.shape)], repeats=1)]
    assert {row.peer: row.ratio is None for row in rows} == {
        workloads.TORCH: True,
        workloads.CHUNKED: True,
        workloads.SKLEARN: True,
        workloads.JAX: True,
        workloads.READ: False,
    }
    made = report(*rows)
    assert all(
        peer in made.text() and peer in made.markdown() for peer in (workloads.TORCH, workloads.SKLEARN, workloads.JAX)
    )
    assert all(row.met is None for row in rows if row.peer != workloads.READ)
    assert len(made.unmeasured()) == sum(row.at_least is not None and row.peer != workloads.READ for row in rows)


def test_every_call_takes_its_turn_in_every_round():
    turns = []
    bench.medians({name: partial(turns.append, name) for name in "ab"}, repeats=2)
    order = [name for i, name in enumerate(turns) if i == 0 or turns[i - 1] != name]
    assert order == ["a", "b", "a", "b", "a"]  # one call each to warm up, then there and back


def test_torch_gets_its_threads_back():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    with bench.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_bar_is_met_from_its_value_on():
    assert row(peer=3.0).met is True
    assert row(peer=2.9).met is False
    assert row(peer=None).met is None
    assert row(at_least=None).met is None


def test_the_report_shows_what_was_measured():
    memory = bench.Memory("forward [2, 5]", {workloads.OURS: 2 * bench.MIB, workloads.TORCH: None})
    made = report(row(), row(peer=2.0), memory=memory)
    text = made.text()
    assert "4.00x" in text and "2.00x" in text and "1.0e+08" not in text
    assert text.count("MISSED") == len(made.missed()) == 2
    assert f"{workloads.OURS} 2.00 MiB, {workloads.TORCH} -" in text
    assert made.machine["cpu"] in text and f"numpy {np.__version__}" in text
    lines = made.markdown().splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert json.loads(json.dumps(made.to_dict()))["rows"][1]["met"] is False


@pytest.mark.parametrize(("peer", "status"), [(4.0, 0), (2.0, 1), (None, 0)])
def test_check_fails_if_a_bar_is_not_met(monkeypatch, capsys, tmp_path, peer, status):
    monkeypatch.setattr(bench, "run", lambda *args: report(row(peer=peer)))
    assert bench.main(["--check", "--markdown", "--json", str(tmp_path / "rows.json")]) == status
    captured = capsys.readouterr()
    assert captured.out.startswith("| work")
    assert ("missed" in captured.err, "not measured" in captured.err) == (peer == 2.0, peer is None)
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["peer_seconds"] == peer
    assert bench.main([]) == 0


@pytest.mark.parametrize("argv", [["nothing"], ["--repeats", "0"]])
def test_the_command_says_what_it_expects(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv)
    assert stopped.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_the_command_measures_what_is_named(capsys):
    assert bench.main(["small", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert workloads.BY_NAME["small"].work in out and workloads.FORWARD.work not in out


def test_the_memory_measurement_sees_an_allocation_of_the_logits_size():
    size = 32 * bench.MIB
    growth = bench.peak_growth(lambda: np.ones(size, np.uint8).sum())
    if growth is None:
        pytest.skip("no /proc/self/status")
    assert 0.95 * size < growth < 1.5 * size
    assert bench.peak_growth(lambda: None) < bench.MEMORY_BAR


def test_memory_that_malloc_kept_hides_nothing():
    size, block = 32 * bench.MIB, 65536  # blocks too small for a mapping of their own
    blocks = [np.ones(block, np.uint8) for _ in range(size // block)]
    last = blocks.pop()  # keeps the end of the heap where it is
    del blocks
    growth = bench.peak_growth(lambda: [np.ones(block, np.uint8) for _ in range(size // block)])
    if growth is None:
        pytest.skip("no /proc/self/status")
    assert growth > 0.9 * size and last.all()


def test_the_memory_of_a_forward_pass_is_measured_in_a_fresh_process():
    shape = (256, 50257)
    memory = bench.measure_memory(shape)
    if memory.growth[workloads.OURS] is None:
        pytest.skip("no /proc/self/status")
    assert memory.met
    if workloads.TORCH in memory.growth:  # torch makes a log-softmax of the logits' size
        assert memory.growth[workloads.TORCH] > 0.9 * 4 * np.prod(shape)


def test_demo_both_scorers_choose_the_same(capsys):
    pytest.importorskip("sklearn")
    found = demo.grid_search(n_samples=300, folds=2)
    assert found.choices[0] == found.choices[1]
    assert found.difference < 1e-12
    assert "largest difference" in capsys.readouterr().out


def test_demo_evaluation_agrees_with_numpy(capsys):
    pytest.importorskip("ml_dtypes")
    found = demo.evaluate(n_rows=100, n_classes=700)
    assert found.perplexity.pop("ce_fast") == pytest.approx(found.exact, rel=1e-6)
    for value in found.perplexity.values():
        assert value == pytest.approx(found.exact, rel=0.05)
    assert "accuracy" in capsys.readouterr().out


def test_demo_language_logits_favour_the_target_without_giving_it_away():
    pytest.importorskip("ml_dtypes")
    perplexity, accuracy = demo.by_blocks(*demo.make_language_logits(300, 1000, block=7))
    assert 0.2 < accuracy < 0.99 and 1 < perplexity < 1000


def test_demo_training_follows_torch(capsys):
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    ours, theirs = demo.train(steps=12, batch=32)
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-5)
    assert ours.losses[-1] < ours.losses[0]
    assert "accuracy" in capsys.readouterr().out


def test_demo_runs_every_section(monkeypatch, capsys):
    assert set(demo.SECTIONS.values()) == {demo.grid_search, demo.evaluate, demo.train, demo.ratios}
    monkeypatch.setattr(demo, "SECTIONS", {"One": partial(demo.ratios, ["small"]), "Two": lambda: print("seen")})
    assert demo.main() == 0
    out = capsys.readouterr().out
    assert "1. One" in out and workloads.BY_NAME["small"].work in out and "2. Two" in out and "seen" in out


@pytest.mark.parametrize("section", [demo.grid_search, demo.evaluate, demo.train])
def test_demo_says_what_to_install(monkeypatch, capsys, section):
    monkeypatch.setattr(workloads, "installed", lambda module: False)
    assert section() is None
    assert "pip install" in capsys.readouterr().out


@pytest.fixture
def asv_suite(monkeypatch):
    monkeypatch.syspath_prepend(str(ASV))
    names = sorted(path.stem for path in ASV.glob("benchmarks/[a-z]*.py"))
    yield {name: importlib.import_module(f"benchmarks.{name}") for name in names}
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_the_asv_suite_has_a_ratio_for_every_workload_and_peer(asv_suite):
    pairs = asv_suite["ratios"].PAIRS.values()
    assert [(w.name, peer) for w, peer in pairs] == [(w.name, p.name) for w in workloads.WORKLOADS for p in w.peers]


def test_the_asv_ratio_is_a_number(asv_suite):
    pytest.importorskip("torch")
    ratio, pair = asv_suite["ratios"].Ratio(), f"small / {workloads.TORCH}"
    ratio.setup(pair)
    assert ratio.track_ratio(pair) > 0


def test_the_asv_suite_skips_hosts_that_are_not_installed(asv_suite, monkeypatch):
    monkeypatch.setattr(workloads, "installed", lambda module: False)
    for module, name, parameters in [
        ("autograd", "Backward", ("256x50257", "float32", "torch")),
        ("linear", "Linear", ("torch",)),
        ("memory", "Growth", (workloads.TORCH,)),
        ("ratios", "Ratio", (f"small / {workloads.TORCH}",)),
        ("scorers", "LogLoss", ("1000x3", "sklearn")),
        ("scorers", "GridSearch", ("sklearn",)),
        ("small", "SmallTorch", ("torch",)),
    ]:
        with pytest.raises(NotImplementedError):
            getattr(asv_suite[module], name)().setup(*parameters)
