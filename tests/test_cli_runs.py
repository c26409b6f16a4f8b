"""Runs of ce-fast in processes of their own: interrupted, gone on with, piped, and within bounds of memory."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from test_cli import Files, fails, full, read_rows

from ce_fast import cli, passes
from ce_fast.comparison import Comparison


@pytest.fixture
def data(tmp_path, rng):
    return Files(tmp_path, rng)


def command(*argv):
    return [sys.executable, "-P", "-m", "ce_fast", *map(str, argv)]


def test_the_module_is_the_command(data):
    done = subprocess.run(
        command("eval", data("logits.npy"), data("target.npy")), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "perplexity" in done.stdout and done.stderr == ""
    done = subprocess.run(command("eval", data("no.npy"), "x"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("ce-fast: error: ")


def test_a_closed_pipe_is_no_error_to_speak_of(data):
    with subprocess.Popen(
        command("eval", data("logits.npy"), data("target.npy")), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == cli.PIPE_CLOSED


def test_an_interrupted_run_goes_on_to_the_numbers_of_one_that_was_not(tmp_path, rng):
    data = Files(tmp_path, rng, (2000, 5))
    options = ["--batch-rows", "1", "--sequence", data("sequence.npy"), "--bytes", "1000"]
    more = ["--resume", data("state"), "--per-row", data("a.npz")]
    argv = command("eval", data("logits.npy"), data("target.npy"), *options, *more)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while not os.path.exists(data("state")) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "perplexity" in out
    assert "interrupted after" in err and "of 2000 rows" in err and "goes on from" in err and err.count("\n") == 1
    with open(data("state"), encoding="utf-8") as file:
        done = json.load(file)["state"]["rows"]
    assert 0 < done < 2000
    resumed = data.run(*options, *more)
    whole = data.run(*options, "--per-row", data("b.npz"))
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    ours, expected = read_rows(data("a.npz")), read_rows(data("b.npz"))
    assert all(np.array_equal(ours[name], expected[name], equal_nan=True) for name in expected)


def test_a_finished_state_says_the_same_again_and_one_of_another_run_is_refused(data, capsys):
    state = ["--resume", data("state")]
    first = data.run(*state)
    again = data.run(*state)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    argv = ["eval", data("logits.npy"), data("target.npy"), *state]
    fails(capsys, [*argv, "--bins", 3], "state of another run: options n_bins differs")
    fails(capsys, ["compare", data("logits.npy"), *argv[1:]], "state of another run")
    np.save(data("target.npy"), data.target[::-1])
    fails(capsys, argv, "state of another run: inputs target files 0 mtime_ns differs")
    with open(data("state"), encoding="utf-8") as file:
        what = json.dumps({"what": json.load(file)["what"]})
    for text in ("", "{}", "[1]", what):
        with open(data("state"), "w", encoding="utf-8") as file:
            file.write(text)
        fails(capsys, argv, "is no state that ce-fast saved")


def test_a_state_is_of_files_and_not_of_how_they_were_named(data, monkeypatch, capsys):
    monkeypatch.chdir(data.folder)
    np.savez("both.npz", x=data.logits, y=data.other)
    for logits in ("both.npz::x", "./both.npz::x", data("both.npz::x")):
        assert cli.main(["eval", logits, "target.npy", "--resume", "state"]) == 0
    fails(capsys, ["eval", "both.npz::y", "target.npy", "--resume", "state"], "inputs logits key differs")


def test_a_state_is_of_one_version(data, monkeypatch, capsys):
    data.run("--resume", data("state"))
    monkeypatch.setattr(passes, "__version__", "0")
    argv = ["eval", data("logits.npy"), data("target.npy"), "--resume", data("state")]
    fails(capsys, argv, "state of another run: version differs")


def test_the_time_before_an_interruption_counts(data):
    data.run("--resume", data("state"))
    with open(data("state"), encoding="utf-8") as file:
        found = json.load(file)
    found["state"]["seconds"] = 1e6
    with open(data("state"), "w", encoding="utf-8") as file:
        json.dump(found, file)
    assert 1e6 < data.run("--resume", data("state"))["seconds"] < 2e6


def test_rows_that_could_not_be_written_at_the_end_are_by_the_same_command(data, monkeypatch, capsys):
    options = ["--resume", data("state"), "--per-row", data("rows.npz")]
    np.savez(data("rows.npz"), old=1)
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        fails(capsys, ["eval", data("logits.npy"), data("target.npy"), *options], "No space left")
    assert list(read_rows(data("rows.npz"))) == ["old"]
    for _ in range(2):
        data.run(*options)
        assert len(read_rows(data("rows.npz"))["lse"]) == 40
        assert [name for name in os.listdir(data.folder) if name.startswith("rows")] == ["rows.npz"]
    os.remove(data("rows.npz"))
    argv = ["eval", data("logits.npy"), data("target.npy"), *options]
    fails(capsys, argv, r"rows\.npz\.part has not the 40 rows")


def test_an_interrupted_run_without_a_state_leaves_the_rows_of_an_older_one(data, monkeypatch):
    data.run("--per-row", data("rows.npz"))
    update = Comparison.update

    def interrupted(self, *args):
        signal.raise_signal(signal.SIGINT)
        return update(self, *args)

    monkeypatch.setattr(Comparison, "update", interrupted)
    inputs = [data("logits.npy"), data("other.npy"), data("target.npy")]
    assert cli.main(["compare", *inputs, "--batch-rows", "8", "--per-row", data("rows.npz")]) == 130
    assert len(read_rows(data("rows.npz"))["lse"]) == 40 and not os.path.exists(data("rows.npz.part"))


def test_a_run_that_died_goes_on_from_its_last_state(data, monkeypatch):
    whole, calls = data.compare("--batch-rows", 8, "--per-row", data("whole.npz")), []
    update = Comparison.update

    def dying(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(self, *args)

    inputs = [data("logits.npy"), data("other.npy"), data("target.npy")]
    argv = ["compare", *inputs, "--batch-rows", "8", "--resume", data("state"), "--json", data("out.json")]
    argv += ["--per-row", data("rows.npz")]
    monkeypatch.setattr(Comparison, "update", dying)
    assert cli.main(argv) == 130 and os.path.getsize(data("rows.npz.part")) == 2 * 8 * 4 * 8
    assert cli.main(argv) == 0 and len(calls) == 3 + 4, "the state was kept after the first of five batches"
    with open(data("out.json"), encoding="utf-8") as file:
        assert json.load(file) | {"seconds": 0} == whole | {"seconds": 0}
    ours, expected = read_rows(data("rows.npz")), read_rows(data("whole.npz"))
    assert all(np.array_equal(ours[name], expected[name], equal_nan=True) for name in expected)


def test_a_state_whose_rows_are_gone_begins_again_only_if_told(data, capsys):
    options = ["--resume", data("state"), "--per-row", data("rows.npz")]
    data.run(*options)
    os.remove(data("rows.npz"))
    fails(capsys, ["eval", data("logits.npy"), data("target.npy"), *options], r"rows\.npz\.part has not the 40 rows")


def write_zeros(path, kind):
    """Logits of some hundred MiB and their targets: a file that takes no disk, or one group or batch of rows."""
    n_rows, n_classes = {
        "classes": (2000, 150_000),
        "rows": (2_500_000, 30),
        "parquet": (6000, 8000),
        "feather": (6000, 8000),
    }[kind]
    np.save(path.with_suffix(".target.npy"), np.ones(n_rows, np.int64))
    if kind in ("parquet", "feather"):
        pa = pytest.importorskip("pyarrow")
        column = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(n_rows * n_classes, np.float32)), n_classes)
        table = pa.table({"x": column})
        if kind == "feather":
            pytest.importorskip("pyarrow.feather").write_feather(table, path, "uncompressed")
        else:
            pytest.importorskip("pyarrow.parquet").write_table(table, path, compression="none", use_dictionary=False)
        return
    with open(path, "wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (n_rows, n_classes)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2 * n_rows * n_classes)


WATCHED = """
import sys, threading, time
from ce_fast import cli
def now():
    with open("/proc/self/status") as f:
        found = dict(line.split(":", 1) for line in f)
    return [int(found[key].split()[0]) // 1024 for key in ("RssAnon", "RssFile")]
before, most = now(), [0, 0]
def watch():
    while True:
        most[:] = map(max, most, now())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
status = cli.main(sys.argv[1:])
print("MiB", *(b - a for a, b in zip(before, most)))
sys.exit(status)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.parametrize("kind", ("classes", "rows", "parquet", "feather"))
def test_memory_stays_bounded_whatever_the_size_of_the_file(tmp_path, kind):
    logits = tmp_path / f"logits.{kind if kind in ('parquet', 'feather') else 'npy'}"
    write_zeros(logits, kind)
    argv = [sys.executable, "-P", "-c", WATCHED, "eval", logits, logits.with_suffix(".target.npy"), "--quiet"]
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    anonymous, mapped = map(int, done.stdout.splitlines()[-1].split()[1:])
    assert anonymous < 150 and mapped < 150, "neither memory of its own nor mapped pages pile up"
