"""The benchmarks and the demo, on tiny sizes: what they compute is right. No test here looks at a clock."""

import importlib
import json
import shutil
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ce_fast import bench, demo, measure, sweep, workloads

TINY = {1: (50,), 2: (44, 11), 4: (2, 5, 4, 3)}  # by the number of dimensions; rows enough for every label to occur
TOLERANCE = {"bfloat16": 1e-2}  # torch's log-softmax is bfloat16 there; all else is float32 or float64
MODULE = {workloads.SKLEARN: "sklearn", workloads.JAX: "jax", workloads.READ: "numpy"}  # the other peers need torch
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


def row(ours=1.0, peer=4.0, at_least=3.0, who=workloads.TORCH, goal=8.0):
    return bench.Row("forward", "forward [2, 5]", (2, 5), who, ours, peer, at_least, goal)


def memory_row(ours=2 * measure.MIB, peer=12 * measure.MIB, under=None, at_least=None):
    return bench.MemoryRow("forward", "forward [2, 5]", workloads.TORCH, ours, peer, under, at_least, None)


def report(*rows, memory=(), points=()):
    return bench.Report(rows, tuple(memory), bench.machine(), tuple(points))


def point(n_classes, ns, who=workloads.OURS, panel=sweep.CLASSES, n_rows=10):
    return sweep.Point(panel, who, n_rows, n_classes, ns * n_rows * n_classes / 1e9)


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
    assert {peer.name for peer in workload.peers if workloads.installed(MODULE.get(peer.name, "torch"))} <= set(calls)
    assert {bar.peer for bar in workload.memory} <= {peer.name for peer in workload.peers}


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
    assert {row.peer for row in rows if row.ratio is not None} == {workloads.READ}
    made = report(*rows)
    assert all(row.peer in made.text() and row.peer in made.text(markdown=True) for row in rows)
    assert all(row.met is None for row in rows if row.peer != workloads.READ)
    assert len(made.unmeasured()) == sum(row.at_least is not None and row.peer != workloads.READ for row in rows)


def test_every_call_takes_its_turn_in_every_round():
    turns = []
    measure.medians({name: partial(turns.append, name) for name in "ab"}, repeats=2)
    order = [name for i, name in enumerate(turns) if i == 0 or turns[i - 1] != name]
    assert order == ["a", "b", "a", "b", "a"]  # one call each to warm up, then there and back


def test_torch_gets_its_threads_back():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    with measure.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_bar_is_met_from_its_value_on():
    assert row(peer=3.0).met is True
    assert row(peer=2.9).met is False
    assert row(peer=None).met is None
    assert row(at_least=None).met is None


def test_a_floor_says_how_many_times_as_long_ours_may_take():
    assert row(ours=1.8, peer=1.0, who=workloads.READ, at_least=1 / 1.8, goal=1 / 1.2).met is True
    slower = row(ours=1.9, peer=1.0, who=workloads.READ, at_least=1 / 1.8, goal=1 / 1.2)
    assert slower.met is False
    line = next(line for line in report(slower).text().splitlines() if workloads.READ in line)
    assert line.endswith("1.9 of it  1.8 of it  1.2 of it  MISSED")


def test_a_memory_bar_is_one_of_bytes_or_of_a_ratio():
    assert memory_row(under=2 * measure.MIB).met is False
    assert memory_row(under=2 * measure.MIB + 1, peer=None).met is True
    assert memory_row(ours=None, under=1).met is None
    assert memory_row(at_least=6).met is True
    assert memory_row(at_least=6.1).met is False
    assert memory_row(at_least=6, peer=None).met is None
    assert memory_row().met is None
    assert memory_row(ours=0).ratio == 12 * measure.MIB / bench.PAGE


def test_the_report_shows_what_was_measured():
    memory = [memory_row(at_least=8), memory_row(under=measure.MIB, peer=None)]
    made = report(row(), row(peer=2.0), memory=memory)
    text = made.text()
    assert "4.00x" in text and "2.00x" in text and "1.0e+08" not in text
    assert text.count("MISSED") == len(made.missed()) == 3
    assert "2.00  torch eager      12.0  6.00x           8x     -  MISSED" in text
    assert "2.00  torch eager         -      -  under 1 MiB     -  MISSED" in text
    assert made.machine["cpu"] in text and f"numpy {np.__version__}" in text
    tables = [block for block in made.text(markdown=True).split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables)


def test_a_report_in_json_is_what_it_was():
    made = report(row(peer=2.0), row(peer=None), memory=[memory_row(at_least=8)], points=[point(3, 1.5)])
    data = made.to_dict()
    assert json.loads(made.to_json()) == data
    assert json.loads(report().to_json()) == report().to_dict()
    again = bench.Report(
        tuple(bench.Row(**{f.name: r[f.name] for f in fields(bench.Row)} | {"shape": (2, 5)}) for r in data["rows"]),
        tuple(bench.MemoryRow(**{f.name: r[f.name] for f in fields(bench.MemoryRow)}) for r in data["memory"]),
        data["machine"],
        tuple(sweep.Point(**p) for p in data["sweep"]),
    )
    assert again == made
    assert (data["rows"][0]["met"], data["rows"][1]["ratio"], data["memory"][0]["ratio"]) == (False, None, 6.0)


def test_the_readme_gets_the_tables_between_its_marks(tmp_path):
    readme = tmp_path / "README.md"
    before, after = bench.MARKS
    readme.write_text(f"a\n{before}\nold \\1\n{after}\nb {before[:4]}\n")
    for _ in range(2):
        bench.update_readme(readme, r"new \1")
        assert readme.read_text() == f"a\n{before}\n\nnew \\1\n\n{after}\nb {before[:4]}\n"
    for wrong in (f"{after} {before}", before, f"{before}{before}{after}", ""):
        readme.write_text(wrong)
        with pytest.raises(ValueError, match=r"README.md: expected <!-- bench --> and then <!-- /bench -->, each once"):
            bench.update_readme(readme, "new")
        assert readme.read_text() == wrong


@pytest.mark.parametrize(("peer", "status"), [(4.0, 0), (2.0, 1), (None, 0)])
def test_check_fails_if_a_bar_is_not_met(monkeypatch, capsys, tmp_path, peer, status):
    monkeypatch.setattr(bench, "run", lambda *args: report(row(peer=peer)))
    assert bench.main(["--check", "--markdown", "--json", str(tmp_path / "rows.json")]) == status
    captured = capsys.readouterr()
    assert captured.out.startswith("| name | work |")
    assert ("missed" in captured.err, "not measured" in captured.err) == (peer == 2.0, peer is None)
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["peer_seconds"] == peer
    assert bench.main([]) == 0


@pytest.mark.parametrize("argv", [["nothing"], ["--repeats", "0"], ["--readme", "README.md", "small"]])
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
    size = 32 * measure.MIB
    growth = measure.peak_growth(lambda: np.ones(size, np.uint8).sum())
    if growth is None:
        pytest.skip("no /proc/self/status")
    assert 0.95 * size < growth < 1.5 * size
    assert measure.peak_growth(lambda: None) < measure.MIB


def test_what_a_call_returns_is_not_memory_that_it_takes():
    def call():
        made = np.ones((3, 32 * measure.MIB), np.uint8)
        return 1.0, (made[0].copy(), [made[1].copy()])

    size, growth = 32 * measure.MIB, measure.peak_growth(call)
    if growth is None:
        pytest.skip("no /proc/self/status")
    assert 0.95 * 3 * size < growth < 1.2 * 3 * size


def test_memory_that_malloc_kept_hides_nothing():
    size, block = 32 * measure.MIB, 65536  # blocks too small for a mapping of their own
    blocks = [np.ones(block, np.uint8) for _ in range(size // block)]
    last = blocks.pop()  # keeps the end of the heap where it is
    del blocks
    growth = measure.peak_growth(lambda: len([np.ones(block, np.uint8) for _ in range(size // block)]))
    if growth is None:
        pytest.skip("no /proc/self/status")
    assert growth > 0.9 * size and last.all()


@pytest.mark.parametrize("workload", [workloads.FORWARD, workloads.BY_NAME["autograd"]], ids=lambda w: w.name)
def test_memory_is_measured_in_fresh_processes_that_have_the_input(workload):
    logits_bytes = 4 * workload.shape[0] * workload.shape[1]
    for row in bench.measure_memory(workload):
        if row.ours_bytes is None:
            pytest.skip("no /proc/self/status, or what it needs is not installed")
        assert row.ours_bytes < logits_bytes / 4
        if row.peer == workloads.TORCH and row.peer_bytes is not None:  # it makes a log-softmax of the logits' size
            assert row.peer_bytes > 0.9 * logits_bytes


def test_memory_is_not_measured_of_workloads_without_a_peer_in_it():
    assert bench.measure_memory(workloads.BY_NAME["small"]) == []


# --- The sweep --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_sweep():
    return sweep.run(total=600, classes=(1, 2, 3, 300), gradient=(2, 10), sizes=(1000, 60_000))


def test_a_sweep_has_every_panel_and_keeps_the_number_of_logits(tiny_sweep):
    ours = [point for point in tiny_sweep if point.who == workloads.OURS]
    assert [(p.panel, p.n_rows, p.n_classes) for p in ours] == [
        *((sweep.CLASSES, 600 // n, n) for n in (1, 2, 3, 300)),
        *((sweep.GRADIENT, 600 // n, n) for n in (2, 10)),
        *((sweep.SIZE, size // n, n) for n, size in ((1000, 1000), (1000, 60_000), (50257, 60_000))),
    ]
    assert {p.who for p in tiny_sweep if p.panel == sweep.SIZE} >= {workloads.OURS, workloads.READ}
    assert all(p.ns_per_logit > 0 for p in tiny_sweep)


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_a_sweep_is_drawn(tiny_sweep, tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{ending}"
    sweep.plot(tiny_sweep, path)
    start = {"svg": b"<?xml", "png": b"\x89PNG"}[ending]
    assert path.read_bytes().startswith(start)
    if ending == "svg":
        drawn = path.read_text()
        whos = {p.who for p in tiny_sweep}
        assert all(text in drawn for text in (*whos, "classes", "logits", "ns per logit"))
        sweep.plot(tiny_sweep, path)
        assert path.read_text() == drawn, "the same points give the same file"


def test_a_peak_and_a_step_are_cliffs_and_a_fall_is_none():
    falling = {n: 1 + 100 / n for n in range(1, 40)}
    flat = [point(n, ns) for n, ns in falling.items()]
    assert sweep.cliffs(flat) == []
    assert sweep.cliff_lines(flat) == ["no cliff"]
    peak = [point(n, ns * (2 if n == 17 else 1)) for n, ns in falling.items()]
    assert [(p.n_classes, round(ratio, 1)) for p, ratio in sweep.cliffs(peak)] == [(17, 1.8)]
    step = [point(n, 1.0 if n < 20 else 1.6) for n in range(1, 40)]
    assert [p.n_classes for p, _ in sweep.cliffs(reversed(step))] == [20, 21]
    assert sweep.cliff_lines(step)[0] == "cliff: forward, 20 classes: 1.6 ns/logit, 1.60 of those before it"
    assert sweep.cliffs([point(n, 1.0 if n < 20 else 1.4) for n in range(1, 40)]) == []
    assert sweep.cliffs([point(n, 10.0**n, who=workloads.TORCH) for n in range(1, 9)]) == [], "only ours count"
    assert sweep.cliffs([]) == []


def test_a_sweep_on_a_busy_machine_says_so():
    reads = [point(n, 0.1, who=workloads.READ) for n in (1, 10, 100)]
    assert sweep.cliff_lines(reads) == ["no cliff"]
    reads.append(point(1000, 0.25, who=workloads.READ))
    assert sweep.cliff_lines(reads)[1:] == ["not to be trusted: reading the same array took 0.1 to 0.25 ns/logit"]


def test_what_seems_a_cliff_is_measured_again():
    points = [point(n, 1.0) for n in range(1, 9)] + [point(9, 5.0), point(10, 5.0), point(9, 7.0, who=workloads.TORCH)]
    asked = []

    def again(n_rows, n_classes):
        asked.append((n_rows, n_classes))
        return [point(n_classes, 1.1 if n_classes == 9 else 6.0)]

    made = sweep.confirmed(points, again)
    assert asked == [(10, 9), (10, 10)]
    assert [p.n_classes for p, _ in sweep.cliffs(made)] == [10]
    assert [p.ns_per_logit for p in made if p.n_classes == 10] == [pytest.approx(5.0)], "the quicker time counts"
    assert [p.ns_per_logit for p in made][-1] == pytest.approx(7.0)


def test_the_command_sweeps_plots_and_writes(monkeypatch, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "run", lambda *args: report(row()))
    points = [point(n, 2.0 if n == 4 else 1.0) for n in range(1, 9)]
    monkeypatch.setattr(sweep, "run", lambda: points)
    readme, table, plot = (tmp_path / name for name in ("README.md", "bench.json", "bench.svg"))
    readme.write_text("\n".join(bench.MARKS))
    assert bench.main(["--json", str(table), "--plot", str(plot), "--readme", str(readme)]) == 0
    assert "cliff: forward, 4 classes" in capsys.readouterr().out
    assert len(json.loads(table.read_text())["sweep"]) == len(points) and plot.exists()
    assert "| forward | forward [2, 5] |" in readme.read_text()
    assert bench.main(["--sweep"]) == 0
    assert "cliff: forward, 4 classes" in capsys.readouterr().out


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
    pairs = asv_suite["ratios"].MEMORY.values()
    assert [(w.name, peer) for w, peer in pairs] == [(w.name, b.peer) for w in workloads.WORKLOADS for b in w.memory]


def test_the_asv_ratio_is_a_number(asv_suite):
    pytest.importorskip("torch")
    ratio, pair = asv_suite["ratios"].Ratio(), f"small / {workloads.TORCH}"
    ratio.setup(pair)
    assert ratio.track_ratio(pair) > 0
    memory, pair = asv_suite["ratios"].MemoryRatio(), f"forward / {workloads.TORCH}"
    memory.setup(pair)
    assert not memory.track_memory_ratio(pair) < 100  # NaN where it cannot be measured


def test_the_asv_suite_skips_hosts_that_are_not_installed(asv_suite, monkeypatch):
    monkeypatch.setattr(workloads, "installed", lambda module: False)
    for module, name, parameters in [
        ("autograd", "Backward", ("256x50257", "float32", "torch")),
        ("linear", "Linear", ("torch",)),
        ("instructions", "Instructions", (None, "forward, long rows")),
        ("memory", "Growth", (f"forward / {workloads.TORCH}",)),
        ("ratios", "Ratio", (f"small / {workloads.TORCH}",)),
        ("ratios", "MemoryRatio", (f"forward / {workloads.TORCH}",)),
        ("scorers", "LogLoss", ("1000x3", "sklearn")),
        ("scorers", "GridSearch", ("sklearn",)),
        ("small", "SmallTorch", ("torch",)),
    ]:
        with pytest.raises(NotImplementedError):
            getattr(asv_suite[module], name)().setup(*parameters)


def test_instructions_are_counted_without_those_of_the_call(asv_suite):
    if shutil.which("valgrind") is None:
        pytest.skip("no valgrind")
    suite = asv_suite["instructions"]
    counts = suite.count()
    if counts is None:
        pytest.skip("the AVX2 kernels or ml_dtypes are not there")
    benchmark = suite.Instructions()
    for name in suite.CASES:
        benchmark.setup(counts, name)
        assert 1 / 8 < benchmark.track_instructions_per_logit(counts, name) < 10_000
    assert counts["forward, long rows"] < counts["loss and gradient, long rows"]
