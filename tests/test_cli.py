"""The command ce-fast gives the numbers of Evaluator and Comparison on the arrays, and says plainly what is wrong."""

import contextlib
import errno
import io
import itertools
import json
import os
import sys

import numpy as np
import pytest

import ce_fast
from ce_fast import cli
from ce_fast.comparison import Comparison
from ce_fast.evaluation import Evaluator

pytest.importorskip("rich")


class Files:
    """Logits, targets and labels of a small model, as arrays and on disk."""

    def __init__(self, folder, rng, shape=(40, 7)):
        self.folder, outer = folder, shape[:-1]
        self.logits = (2 * rng.normal(size=shape)).astype(np.float32)
        self.other = (self.logits + 0.3 * rng.normal(size=shape)).astype(np.float32)
        self.target = rng.integers(0, shape[-1], outer)
        self.target[1] = -100
        self.weight = rng.integers(0, 4, outer).astype(float)
        self.group = rng.choice(["art", "law", "physics"], outer)
        self.sequence = np.sort(rng.integers(0, 5, outer), axis=None).reshape(outer)
        for name in ("logits", "other", "target", "weight", "group", "sequence"):
            np.save(folder / f"{name}.npy", getattr(self, name))

    def __call__(self, name):
        return str(self.folder / name)

    def run(self, *options, logits="logits.npy", target="target.npy"):
        """The JSON output of ce-fast eval."""
        path = self("out.json")
        assert cli.main(["eval", self(logits), self(target), "--json", path, "--quiet", *map(str, options)]) == 0
        with open(path, encoding="utf-8") as file:
            return json.load(file)

    def compare(self, *options):
        path = self("out.json")
        inputs = [self("logits.npy"), self("other.npy"), self("target.npy")]
        assert cli.main(["compare", *inputs, "--json", path, "--quiet", *map(str, options)]) == 0
        with open(path, encoding="utf-8") as file:
            return json.load(file)


@pytest.fixture
def data(tmp_path, rng):
    return Files(tmp_path, rng)


@pytest.fixture
def batched(tmp_path, rng):
    return Files(tmp_path, rng, (6, 5, 7))


def close(found, expected, where=""):
    """That all `expected` holds is in `found`, and equal to rounding: sums of other batches."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            close(a, b, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), where
    else:
        assert found == expected, where


def evaluated(logits, target, *args, n=(0, 0), sequence=None, **options):
    evaluator = Evaluator(class_axis=-1, **options)
    evaluator.update(logits, target, *args, sequence=sequence, n_bytes=n[0], n_characters=n[1])
    return evaluator.compute().to_dict()


# --- Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", (1, 3, 1000))
def test_eval_gives_the_numbers_of_an_evaluator_on_the_arrays(data, batch):
    close(data.run("--batch-rows", batch), evaluated(data.logits, data.target))


def test_eval_of_sequences_gives_the_curve_by_position(batched):
    found = batched.run("--batch-rows", 4)
    close(found, evaluated(batched.logits, batched.target))
    assert len(found["by_position"]["nll"]) == 5


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (["--ignore-index", "3"], {"ignore_index": 3}),
        (["--temperature", "2.5"], {"temperature": 2.5}),
        (["--temperatures", "0.5,1,2"], {"temperatures": (0.5, 1, 2)}),
        (["--top-k", "1,3,6"], {"top_k": (1, 3, 6)}),
        (["--bins", "4"], {"n_bins": 4}),
        (["--bytes", "120", "--characters", "90"], {"n": (120, 90)}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_option_is_that_of_the_evaluator(data, given, options):
    target = data.target if "ignore_index" not in options else np.where(data.target < 0, 3, data.target)
    np.save(data("target.npy"), target)
    found, plain = data.run(*given, "--batch-rows", 16), evaluated(data.logits, target % 7)
    close(found, evaluated(data.logits, target, **options))
    assert {k: found[k] for k in plain} != plain


def test_threads_change_no_bit(data):
    one, two = (data.run("--threads", n) for n in (1, 2))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}


@pytest.mark.parametrize("shape", ((40, 7), (6, 5, 7)), ids=str)
def test_labels_of_rows_reach_the_evaluator(tmp_path, rng, shape):
    data = Files(tmp_path, rng, shape)
    options = [f"--{o}={data(f)}.npy" for o, f in (("sample-weight", "weight"), ("group", "group"), ("sequence",) * 2)]
    found = data.run(*options, "--batch-rows", 4)
    close(found, evaluated(data.logits, data.target, data.weight, data.group, sequence=data.sequence))
    assert [group["label"] for group in found["groups"]] == ["art", "law", "physics"] and found["sequences"]["id"]


def test_labels_of_sequences_are_those_of_all_their_rows(batched, rng):
    labels = {"group": np.array(list("abcabc")), "sample-weight": np.arange(6.0), "sequence": np.arange(6)}
    options = []
    for name, label in labels.items():
        np.save(batched(f"{name}-6.npy"), label)
        options += [f"--{name}", batched(f"{name}-6.npy")]
    group, weight, ids = (np.repeat(label[:, None], 5, 1) for label in labels.values())
    found = batched.run(*options, "--batch-rows", 4)
    close(found, evaluated(batched.logits, batched.target, weight, group, sequence=ids))


@pytest.mark.parametrize("batch", (1, 3, 1000))
def test_shift_takes_each_token_as_the_target_of_the_logits_before_it(data, batch):
    found = data.run("--shift", "--batch-rows", batch, "--group", data("group.npy"))
    close(found, evaluated(data.logits[:-1], data.target[1:], None, data.group[1:]))


def test_shift_of_sequences_goes_along_time(batched):
    weight = batched.weight[:, 1:]
    found = batched.run("--shift", "--batch-rows", 4, "--sample-weight", batched("weight.npy"))
    close(found, evaluated(batched.logits[:, :-1], batched.target[:, 1:], weight))


def test_shift_does_not_predict_the_first_token_of_a_sequence_by_the_last_of_another(data):
    ids = data.sequence
    target = np.where(ids[1:] == ids[:-1], data.target[1:], -100)
    for batch in (1, 3, 1000):
        found = data.run("--shift", "--batch-rows", batch, "--sequence", data("sequence.npy"))
        close(found, evaluated(data.logits[:-1], target, sequence=ids[1:]))


@pytest.mark.parametrize("batch", (1, 4, 1000))
def test_shift_within_a_row_of_packed_sequences_predicts_in_each_alone(batched, batch):
    ids = np.sort(batched.sequence % 3, axis=1)
    np.save(batched("packed.npy"), ids)
    target = np.where(ids[:, 1:] == ids[:, :-1], batched.target[:, 1:], -100)
    assert (target != batched.target[:, 1:]).any()
    found = batched.run("--shift", "--batch-rows", batch, "--sequence", batched("packed.npy"))
    close(found, evaluated(batched.logits[:, :-1], target, sequence=ids[:, 1:]))


def test_targets_that_are_never_read_are_not_checked(batched, data):
    data.weight[[3, 20]], data.target[[3, 20]] = 0, 99
    np.save(data("target.npy"), data.target)
    np.save(data("weight.npy"), data.weight)
    found = data.run("--sample-weight", data("weight.npy"))
    close(found, evaluated(data.logits, data.target, data.weight))


def test_what_shift_leaves_out_is_not_checked(batched):
    batched.target[:, 0], batched.weight[:, 0] = 99, np.nan
    np.save(batched("target.npy"), batched.target)
    np.save(batched("weight.npy"), batched.weight)
    found = batched.run("--shift", "--sample-weight", batched("weight.npy"))
    close(found, evaluated(batched.logits[:, :-1], batched.target[:, 1:], batched.weight[:, 1:]))


@pytest.mark.parametrize("batch", (1, 16, 1000))
def test_compare_gives_the_numbers_of_a_comparison_on_the_arrays(data, batch):
    options = ["--batch-rows", batch, "--sample-weight", data("weight.npy"), "--temperature", 2]
    comparison = Comparison(temperature=2.0)
    comparison.update(data.logits, data.other, data.target, data.weight)
    close(data.compare(*options), comparison.compute().to_dict())


def test_compare_takes_ignore_index_and_strict(data, capsys):
    data.logits[4, 2], data.target[4] = np.nan, 0
    np.save(data("logits.npy"), data.logits)
    np.save(data("target.npy"), np.where(data.target < 0, 3, data.target))
    comparison = Comparison(ignore_index=3)
    comparison.update(data.logits, data.other, np.load(data("target.npy")))
    expected = comparison.compute().to_dict()
    assert expected["n_ignored"] > 1
    close(data.compare("--ignore-index", 3), expected)
    argv = ["compare", data("logits.npy"), data("other.npy"), data("target.npy")]
    fails(capsys, [*argv, "--strict"], r"\b4\b")


def test_threads_reach_the_evaluator_of_a_state_too(data, monkeypatch):
    given, init = [], Evaluator.__init__
    monkeypatch.setattr(
        Evaluator, "__init__", lambda self, **options: given.append(options["n_threads"]) or init(self, **options)
    )
    for n in (1, 2):
        data.run("--threads", n, "--resume", data("state"))
    assert given == [1, 2]


def test_compare_shifts_both(batched):
    comparison = Comparison(class_axis=-1)
    comparison.update(batched.logits[:, :-1], batched.other[:, :-1], batched.target[:, 1:])
    close(batched.compare("--shift", "--batch-rows", 4), comparison.compute().to_dict())


# --- Inputs -----------------------------------------------------------------------------------------------------------


def test_files_cut_in_different_places_give_the_numbers_of_the_whole(data):
    for i, part in enumerate(np.split(data.logits, [3, 20, 21])):
        np.save(data(f"cut{i + 8}.npy"), part)
    for i, part in enumerate(np.split(data.target, [11])):
        np.savez_compressed(data(f"ids{i}.npz"), ids=part, other=part)
    found = data.run("--targets-key", "ids", "--batch-rows", 6, logits="cut*.npy", target="ids*.npz")
    close(found, evaluated(data.logits, data.target))
    assert [os.path.basename(file["path"]) for file in found["inputs"]["logits"]["files"]][-1] == "cut11.npy"


def test_compare_shifts_within_sequences_alone(data):
    first = np.r_[True, data.sequence[1:] != data.sequence[:-1]]  # nothing predicts it
    ids = np.where(first, -100, data.target)[1:]
    comparison = Comparison()
    comparison.update(data.logits[:-1], data.other[:-1], ids)
    close(data.compare("--shift", "--sequence", data("sequence.npy")), comparison.compute().to_dict())


def test_compare_joins_models_that_are_cut_in_different_places(data):
    for i, part in enumerate(np.split(data.other, [7, 30])):
        np.save(data(f"int4-{i}.npy"), part)
    whole = data.compare()
    inputs = [data("logits.npy"), data("int4-*.npy"), data("target.npy")]
    assert cli.main(["compare", *inputs, "--json", data("cut.json"), "--quiet", "--batch-rows", "4"]) == 0
    with open(data("cut.json"), encoding="utf-8") as file:
        close(json.load(file)["kl"], whole["kl"])


def test_logits_and_targets_of_one_file_are_told_apart_by_key(data):
    np.savez(data("both.npz"), z=data.logits, y=data.target)
    expected = evaluated(data.logits, data.target)
    close(data.run(logits="both.npz::z", target="both.npz::y"), expected)
    close(data.run("--logits-key", "z", "--targets-key", "y", logits="both.npz", target="both.npz"), expected)


def test_dtype_says_what_16_bit_integers_are(data):
    import ml_dtypes

    logits = data.logits.astype(ml_dtypes.bfloat16)
    np.save(data("raw.npy"), logits.view(np.uint16))
    close(data.run("--dtype", "bfloat16", logits="raw.npy"), evaluated(logits, data.target))


# --- Outputs ----------------------------------------------------------------------------------------------------------


def test_json_holds_inputs_options_and_time(data):
    found = data.run("--top-k", "1,3", "--shift")
    assert (found["schema"], found["kind"], found["version"]) == (1, "evaluation", ce_fast.__version__)
    inputs = found["inputs"]["logits"]
    assert inputs["shape"] == [40, 7] and inputs["dtype"] == "float32"
    assert inputs["files"][0] | {"mtime_ns": 0} == {
        "path": data("logits.npy"), "bytes": os.path.getsize(data("logits.npy")), "mtime_ns": 0,
    }  # fmt: skip
    assert found["options"]["top_k"] == [1, 3] and found["options"]["shift"] is True and found["seconds"] > 0


def test_json_on_standard_output_is_all_there_is(data, capsys):
    assert cli.main(["eval", data("logits.npy"), data("target.npy"), "--json", "-"]) == 0
    close(json.loads(capsys.readouterr().out), evaluated(data.logits, data.target))


def test_the_table_has_each_number_with_its_standard_error(data, capsys):
    assert (
        cli.main(["eval", data("logits.npy"), data("target.npy"), "--group", data("group.npy"), "--bytes", "90"]) == 0
    )
    out, err = capsys.readouterr()
    report = evaluated(data.logits, data.target, None, data.group, n=(90, 0))
    lines = {
        line[: line.index("  ")]: line.split()[-2:] for line in out.splitlines() if "  " in line and line[0] != " "
    }
    for name, of in (
        ("perplexity", report["overall"]["perplexity"]),
        ("calibration error", report["calibration_error"]),
        ("bits per byte", report["bits_per_byte"]),
    ):
        assert lines[name] == [f"{of['value']:.6g}", f"{of['stderr']:.2g}"]
    assert lines["law"][0] == f"{report['groups'][1]['perplexity']['value']:.6g}"
    assert "\x1b" not in out and err == "" and out.isascii()


def test_temperatures_are_lines_of_the_table(data, capsys):
    assert cli.main(["eval", data("logits.npy"), data("target.npy"), "--temperatures", "0.5,2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = evaluated(data.logits, data.target, temperatures=(0.5, 2))
    assert ["best", "temperature", f"{found['best_temperature']:g}"] in lines
    for t, nll, stderr in zip(*found["temperatures"].values(), strict=True):
        assert ["nll", "at", "temperature", f"{t:g}", f"{nll:.6g}", f"{stderr:.2g}"] in lines


def test_the_same_command_prints_the_same(data, capsys):
    texts = []
    for _ in range(2):
        assert cli.main(["compare", data("logits.npy"), data("other.npy"), data("target.npy")]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and "KL(base || other)" in texts[0] and "99.9 %" in texts[0]


def test_a_terminal_shows_progress_and_a_drawn_table(data, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    for options in ([], ["--quiet"]):
        out, err = Terminal(), Terminal()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert cli.main(["eval", data("logits.npy"), data("target.npy"), "--batch-rows", "4", *options]) == 0
        assert "\u2500" in out.getvalue() and "perplexity" in out.getvalue()
        seen = [text in err.getvalue() for text in ("40/40 rows", "rows/s", "GB/s")]
        assert seen == [not options] * 3


@pytest.mark.parametrize("suffix", ("npz", "parquet"))
def test_per_row_has_what_is_known_of_each_row(data, suffix):
    path = data(f"rows.{suffix}")
    data.run("--per-row", path, "--batch-rows", 16)
    values = Evaluator().update(data.logits, data.target)
    found = read_rows(path)
    assert list(found) == ["lse", "log_prob", "max", "argmax", "rank", "entropy", "sum_sq_prob"]
    for name, column in found.items():
        np.testing.assert_array_equal(column, getattr(values, name))
    assert found["rank"].dtype == np.int64 and not os.path.exists(path + ".part")


def test_per_row_of_a_comparison(batched):
    batched.compare("--per-row", batched("rows.parquet"), "--batch-rows", 4)
    values = Comparison(class_axis=-1).update(batched.logits, batched.other, batched.target)
    for name, column in read_rows(batched("rows.parquet")).items():
        np.testing.assert_allclose(column, values[name], rtol=1e-12)


def read_rows(path):
    if path.endswith(".npz"):
        with np.load(path) as archive:
            return dict(archive)
    table = pytest.importorskip("pyarrow.parquet").read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


@pytest.mark.parametrize("command", ("eval", "compare"))
def test_html_is_a_page(data, command):
    pytest.importorskip("plotly")
    logits = [data("logits.npy")] + [data("other.npy")] * (command == "compare")
    assert cli.main([command, *logits, data("target.npy"), "--html", data("page.html"), "--quiet"]) == 0
    with open(data("page.html"), encoding="utf-8") as file:
        text = file.read()
    assert "<html" in text and "logits.npy" in text


def test_logits_without_a_softmax_are_named_and_left_out_or_an_error(data, capsys):
    data.logits[[4, 30], 2] = np.nan
    data.target[[4, 30]] = 0
    np.save(data("logits.npy"), data.logits)
    np.save(data("target.npy"), data.target)
    command = ["eval", data("logits.npy"), data("target.npy"), "--batch-rows", "8"]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert err == "ce-fast: warning: 2 rows have no softmax (NaN or +inf) and are left out: 4; 30\n"
    assert "rows without a softmax" in out
    assert cli.main([*command, "--quiet"]) == 0 and capsys.readouterr().err == ""
    fails(capsys, [*command, "--strict"], r"\b4\b")


def test_rows_of_sequences_without_a_softmax_are_named_by_their_index(batched, capsys):
    batched.logits[4, 2, 1] = np.inf
    batched.target[4] = 0
    np.save(batched("logits.npy"), batched.logits)
    np.save(batched("target.npy"), batched.target)
    for shift in ([], ["--shift"]):
        assert cli.main(["eval", batched("logits.npy"), batched("target.npy"), *shift]) == 0
        assert capsys.readouterr().err.endswith("left out: 4, 2\n")
        assert batched.run(*shift)["invalid_positions"] == [[4, 2]]
    for option in ("--bytes", "--characters"):
        assert cli.main(["eval", batched("logits.npy"), batched("target.npy"), option, "9"]) == 0
        told = "left out: 4, 2; without their losses there are no bits per byte or character\n"
        assert capsys.readouterr().err.endswith(told)


def test_warnings_are_lines_and_quiet_has_none(data, capsys):
    p = np.exp(data.logits) / np.exp(data.logits).sum(1, keepdims=True)
    np.save(data("p.npy"), p)
    assert cli.main(["eval", data("p.npy"), data("target.npy")]) == 0
    err = capsys.readouterr().err
    assert err.startswith("ce-fast: warning: logits look like probabilities") and err.count("\n") == 1
    assert cli.main(["eval", data("p.npy"), data("target.npy"), "--quiet"]) == 0 and capsys.readouterr().err == ""


# --- Errors -----------------------------------------------------------------------------------------------------------


def fails(capsys, argv, *parts):
    """That the command exits with 1 and one line that has all `parts`."""
    import re

    capsys.readouterr()
    assert cli.main([str(arg) for arg in argv]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("ce-fast: error: ") and err.count("\n") == 1, err
    for part in parts:
        assert re.search(part, err), err


def test_shapes_that_do_not_fit_name_both_files(data, capsys):
    np.save(data("short.npy"), data.target[:-1])
    np.save(data("wide.npy"), np.zeros((40, 8)))
    np.save(data("flat.npy"), np.zeros(40))
    logits, target = data("logits.npy"), data("target.npy")
    fails(capsys, ["eval", logits, data("short.npy")], r"logits\.npy .*\(40, 7\)", r"short\.npy .*\(39,\)")
    fails(capsys, ["compare", logits, data("wide.npy"), target], r"logits\.npy .*\(40, 7\)", r"wide\.npy \(40, 8\)")
    fails(capsys, ["eval", data("flat.npy"), target], r"flat\.npy have shape \(40,\); expected \[N, V\]")
    fails(capsys, ["eval", logits, target, "--group", data("short.npy")], r"group of .*short\.npy .*\(39,\)")


def test_data_of_the_wrong_kind_are_refused(data, capsys):
    logits, target = data("logits.npy"), data("target.npy")
    np.save(data("float.npy"), data.target.astype(float))
    np.save(data("empty.npy"), np.zeros((0, 7)))
    np.save(data("none.npy"), np.zeros(0, int))
    fails(capsys, ["eval", logits, data("float.npy")], r"float\.npy have dtype float64; expected an integer")
    fails(capsys, ["eval", target, target], r"target\.npy")
    fails(capsys, ["eval", data("empty.npy"), data("none.npy")], "no rows")
    for shape in ((1, 7), (3, 1, 7)):
        np.save(data("one.npy"), np.zeros(shape))
        np.save(data("ones.npy"), np.zeros(shape[:-1], int))
        fails(capsys, ["eval", data("one.npy"), data("ones.npy"), "--shift"], r"one\.npy have .*: no rows to shift")
    fails(capsys, ["eval", logits, data("missing.npy")], r"missing\.npy: no such file")
    fails(capsys, ["eval", logits, target, "--sample-weight", data("group.npy")], "sample_weight has dtype")


def test_a_target_beyond_int64_is_no_class_and_not_wrapped_to_the_ignored_one(data, capsys):
    target = np.where(data.target < 0, 0, data.target).astype(np.uint64)
    target[1] = 2**64 - 100
    np.save(data("target.npy"), target)
    np.save(data("sequence.npy"), np.arange(40) // 8)
    command = ["eval", data("logits.npy"), data("target.npy"), "--shift"]
    for more in ([], ["--sequence", data("sequence.npy")]):
        fails(capsys, [*command, *more], r"target \[1\] of .*target\.npy is 18446744073709551516; expected 0 <= target")


@pytest.mark.parametrize("shift", ([], ["--shift"]), ids=("", "shift"))
def test_a_target_that_is_no_class_is_named_by_its_row_in_the_file(data, capsys, shift):
    data.target[31] = 7
    np.save(data("target.npy"), data.target)
    command = ["eval", data("logits.npy"), data("target.npy"), "--batch-rows", 8, *shift]
    fails(capsys, command, r"target \[31\] of .*target\.npy is 7; expected 0 <= target < 7 or ignore_index=-100")


def test_a_target_of_a_sequence_is_named_by_its_index(batched, capsys):
    batched.target[4, 3] = -1
    np.save(batched("target.npy"), batched.target)
    fails(
        capsys, ["eval", batched("logits.npy"), batched("target.npy"), "--batch-rows", 2], r"target \[4, 3\] .* is -1;"
    )


def test_a_weight_that_is_none_is_named_by_its_row_in_the_file(batched, capsys):
    command = ["eval", batched("logits.npy"), batched("target.npy"), "--batch-rows", 2, "--shift", "--sample-weight"]
    batched.weight[4, 3] = -1
    np.save(batched("weight.npy"), batched.weight)
    np.save(batched("6.npy"), np.array([1, 1, 1, 1, 1, np.nan]))
    fails(
        capsys, [*command, batched("weight.npy")], r"sample weight \[4, 3\] of .*weight\.npy is -1\.0; expected finite"
    )
    fails(capsys, [*command, batched("6.npy")], r"sample weight \[5\] of .*6\.npy is nan; expected finite")


def test_an_output_that_cannot_be_written_fails_before_the_run(data, capsys):
    os.mkdir(data("folder.npz"))
    command = ["eval", data("logits.npy"), data("target.npy"), "--resume", data("state")]
    for option in ("--json", "--html", "--per-row", "--resume"):
        fails(capsys, [*command, option, data("nowhere/out.npz")], f"{option} .*nowhere/out.npz: there is no directory")
        fails(capsys, [*command[:3], option, data("folder.npz")], f"{option} .*folder.npz: cannot be written")
    assert not os.path.exists(data("state")), "it ran"
    fails(capsys, [*command, "--json", data("logits.npy")], "would overwrite an input")
    fails(capsys, [*command, "--json", data("x"), "--html", data("x")], "would overwrite")
    assert np.load(data("logits.npy")).shape == (40, 7)


def test_an_output_that_cannot_be_written_or_replaced_fails_before_the_run(data, capsys, monkeypatch):
    command = ["eval", data("logits.npy"), data("target.npy")]
    os.mkdir(data("closed"))
    for path in ("closed/out.npz", "link.npz"):
        with open(data("closed/out.npz"), "w", encoding="utf-8"):
            pass
        if path == "link.npz":
            os.symlink(data("closed/out.npz"), data(path))
        for closed, option in itertools.product(
            map(data, ("closed", "closed/out.npz")), ("--json", "--html", "--per-row", "--resume")
        ):
            with monkeypatch.context() as patch:  # who runs the tests may write anywhere
                patch.setattr(os, "access", lambda at, mode, closed=closed: os.path.realpath(at) != closed)
                fails(capsys, [*command, option, data(path)], rf"{option} .*(out|link)\.npz: cannot be written")
    assert os.path.getsize(data("closed/out.npz")) == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_what_is_read_again_is_no_pipe(data, capsys):
    os.mkfifo(data("pipe.npz"))
    for option in ("--per-row", "--resume"):
        argv = ["eval", data("logits.npy"), data("target.npy"), option, data("pipe.npz")]
        fails(capsys, argv, f"{option} .*pipe.npz is a pipe or device; expected a file")


def test_per_row_through_a_link_replaces_what_it_points_to(data):
    os.mkdir(data("disk"))
    os.symlink(data("disk/rows.npz"), data("link.npz"))
    data.run("--per-row", data("link.npz"))
    assert os.path.islink(data("link.npz")) and len(read_rows(data("disk/rows.npz"))["lse"]) == 40
    assert os.listdir(data("disk")) == ["rows.npz"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any bytes")
def test_a_file_name_of_any_bytes_is_escaped_in_outputs(data):
    pytest.importorskip("plotly")
    np.save(data("x\udcff.npy"), data.logits)
    found = data.run("--html", data("page.html"), logits="x\udcff.npy")["inputs"]["logits"]
    with open(data("page.html"), encoding="utf-8") as file:
        assert "x\\udcff.npy" in file.read()
    assert found["name"] == found["files"][0]["path"] == data("x\\udcff.npy")


def test_what_standard_output_cannot_encode_is_escaped(data):
    np.save(data("group.npy"), np.where(data.group == "law", "\u00e9", data.group))
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(out):
        assert cli.main(["eval", data("logits.npy"), data("target.npy"), "--group", data("group.npy")]) == 0
    assert b"\n\\xe9 " in out.buffer.getvalue()


def test_an_error_at_the_end_leaves_no_part_of_a_file(data, capsys, monkeypatch):
    for suffix, module in (("npz", np), ("parquet", pytest.importorskip("pyarrow.parquet"))):
        monkeypatch.setattr(module, {"npz": "savez", "parquet": "ParquetWriter"}[suffix], full)
        argv = ["eval", data("logits.npy"), data("target.npy"), "--per-row", data(f"rows.{suffix}")]
        fails(capsys, argv, "No space left")
        assert not [name for name in os.listdir(data.folder) if name.startswith("rows")]


def full(file, *args, **arrays):
    """As numpy.savez, on a disk without space."""
    if isinstance(file, str):
        open(file, "wb").close()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_error_leaves_no_part_of_a_file(data, capsys):
    data.target[31] = 7
    np.save(data("target.npy"), data.target)
    command = ["eval", data("logits.npy"), data("target.npy"), "--batch-rows", "8"]
    fails(capsys, [*command, "--per-row", data("rows.npz")])
    assert not [name for name in os.listdir(data.folder) if name.startswith("rows")]


@pytest.mark.parametrize(
    "argv",
    (
        [], ["evaluate"], ["eval", "a.npy"], ["eval", "a.npy", "b.npy", "c.npy"], ["eval", "a", "b", "--bins", "0"],
        ["eval", "a", "b", "--temperature", "0"], ["eval", "a", "b", "--temperature", "nan"],
        ["eval", "a", "b", "--top-k", "1,x"], ["eval", "a", "b", "--per-row", "rows.csv"],
        ["eval", "a", "b", "--dtype", "float8"], ["compare", "a", "b", "c", "--bins", "3"],
        ["compare", "a", "b", "c", "--sequence", "d"],
    ),
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_command_line_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_pattern_that_the_shell_expanded_is_hinted_at(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "a0.npy", "a1.npy", "a2.npy", "targets.npy"])
    assert "a2.npy targets.npy (the shell expands a pattern that is not in quotes)" in capsys.readouterr().err


# --- The other commands -----------------------------------------------------------------------------------------------


def test_version_and_help(capsys):
    for argv, text in ((["--version"], f"ce-fast {ce_fast.__version__}"), (["--help"], "ce-fast eval logits.npy")):
        with pytest.raises(SystemExit) as exit_:
            cli.main(argv)
        assert exit_.value.code == 0 and text in capsys.readouterr().out


def test_info_has_the_backend_and_optional_packages(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "backend: " in out and "rich: " in out and "dask: " in out


def test_bench_and_demo_pass_their_arguments_on(monkeypatch):
    from ce_fast import bench, demo

    seen = []
    monkeypatch.setattr(bench, "main", lambda argv: seen.append(argv) or 3)
    monkeypatch.setattr(demo, "main", lambda: 4)
    assert cli.main(["bench", "--quick", "kl"]) == 3 and cli.main(["demo"]) == 4 and seen == [["--quick", "kl"]]
