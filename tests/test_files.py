"""Arrays in files give the rows that NumPy reads, whatever the format, the batches and the cut; damage is told."""

import json
import os
import stat
import struct
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from ce_fast import files

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
NUMPY_FORMATS = ("npy", "fortran.npy", "npz", "compressed.npz", "safetensors")
ARROW_FORMATS = ("parquet", "feather", "lz4.feather", "arrow")


def arrow_column(array, lists):
    pa = pytest.importorskip("pyarrow")
    column = pa.array(np.ascontiguousarray(array).reshape(-1))
    for size in array.shape[:0:-1]:
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column.cast(pa.list_(column.type.value_type)) if lists else column


def write(path, arrays, kind):
    """`arrays` by key, in the format that `kind` ends in."""
    suffix = kind.rpartition(".")[2]
    path = path.with_suffix("." + suffix)
    if suffix == "npy":
        (array,) = arrays.values()
        np.save(path, np.asfortranarray(array) if kind.startswith("fortran") else array)
    elif suffix == "npz":
        (np.savez_compressed if kind.startswith("compressed") else np.savez)(path, **arrays)
    elif suffix == "safetensors":
        pytest.importorskip("safetensors.numpy").save_file(arrays, path)
    else:
        pa = pytest.importorskip("pyarrow")
        table = pa.table({key: arrow_column(array, kind.startswith("lists")) for key, array in arrays.items()})
        if suffix == "parquet":
            pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=7)
        elif suffix == "feather":
            compression = "lz4" if kind.startswith("lz4") else "uncompressed"
            pytest.importorskip("pyarrow.feather").write_feather(table, path, compression, chunksize=5)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table, 4)
    return str(path)


def in_batches(source, size):
    """All rows, as a pass asks for them."""
    parts, start = [], 0
    while start < source.shape[0]:
        parts.append(source.some(start, min(start + size, source.shape[0])))
        assert 1 <= len(parts[-1]) <= size
        start += len(parts[-1])
    return np.concatenate(parts)


def same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("size", (1, 4, 23, 100))
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *((kind, shape) for kind in NUMPY_FORMATS + ARROW_FORMATS for shape in ((23,), (23, 5), (23, 3, 5))),
        ("lists.parquet", (23, 5)),  # lists of no fixed length: of one length all the same
    ],
    ids=str,
)
def test_batches_join_to_the_array_that_was_written(tmp_path, rng, kind, shape, size):
    array = rng.normal(size=shape).astype(np.float32)
    source = files.open_source(write(tmp_path / "x", {"x": array}, kind))
    assert source.shape == shape and source.dtype == np.float32 and files.row_bytes(source) == array[0].nbytes
    same(in_batches(source, size), array)
    same(files.rows(source, 3, 17), array[3:17])
    same(files.rows(source, 2, 2), array[2:2])


@pytest.mark.parametrize("kind", NUMPY_FORMATS)
@pytest.mark.parametrize("wanted", ("float64", "float16", "bfloat16", "int32", "uint8"))
def test_every_dtype_comes_back(tmp_path, rng, kind, wanted):
    array = rng.integers(0, 100, (9, 4)).astype(np.dtype(wanted))
    same(in_batches(files.open_source(write(tmp_path / "x", {"x": array}, kind)), 4), array)


@pytest.mark.parametrize("kind", ("npy", "npz", "compressed.npz", "safetensors", "parquet", "feather"))
def test_16_bit_integers_are_seen_as_the_floats_they_are(tmp_path, rng, kind):
    array = rng.normal(size=(9, 4)).astype(BFLOAT16)
    path = write(tmp_path / "x", {"x": array.view(np.uint16)}, kind)
    assert files.open_source(path).dtype == np.uint16
    same(in_batches(files.open_source(path, dtype="bfloat16"), 4), array)
    same(in_batches(files.open_source(path, dtype="float16"), 4), array.view(np.float16))


@pytest.mark.parametrize(
    ("kind", "stored", "dtype"),
    [("npy", "float16", "bfloat16"), ("npz", "float32", "bfloat16"), ("safetensors", "float16", "bfloat16"),
     ("safetensors", "bfloat16", "float16"), ("parquet", "float16", "bfloat16")],
)  # fmt: skip
def test_what_the_file_calls_a_float_is_what_it_says(tmp_path, rng, kind, stored, dtype):
    array = rng.normal(size=(9, 4)).astype(stored)
    same(in_batches(files.open_source(write(tmp_path / "x", {"x": array}, kind), dtype=dtype), 4), array)


@pytest.mark.parametrize("stored", ("int32", ">i2", "S2", "bool"))
def test_only_native_values_of_16_bits_are_seen_as_floats(tmp_path, stored):
    path = write(tmp_path / "x", {"x": np.zeros((2, 3), stored)}, "npy")
    with pytest.raises(ValueError, match=r"x\.npy has dtype .*, which cannot be seen as bfloat16"):
        files.open_source(path, dtype="bfloat16")


@pytest.mark.parametrize("kind", ("npy", "npz", "safetensors"))
def test_what_lies_in_a_file_is_mapped_and_not_copied(tmp_path, kind):
    source = files.open_source(write(tmp_path / "x", {"x": np.zeros((50, 8), np.float32)}, kind))
    assert isinstance(source, files.Mapped)
    rows, base = source.some(10, 20), None
    base = rows.base
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap) and base.nbytes == rows.nbytes, "a batch maps its own rows alone"


def test_arrow_files_that_are_not_compressed_are_not_copied(tmp_path, rng):
    array = rng.normal(size=(20, 8)).astype(np.float32)
    source = files.open_source(write(tmp_path / "x", {"x": array}, "feather"))
    first, again = source.some(0, 5), source.some(0, 5)
    assert not first.flags.owndata and not first.flags.writeable and np.shares_memory(first, again)


@pytest.mark.parametrize("suffix", ("feather", "arrow"))
def test_of_compressed_arrow_files_one_batch_of_one_column_is_held(tmp_path, suffix):
    pa = pytest.importorskip("pyarrow")
    arrays = {"z": np.zeros((4096, 1024), np.float32), "ids": np.arange(4096)}  # 4 batches of 4 MiB
    table = pa.table({key: arrow_column(array, False) for key, array in arrays.items()})
    path, options = str(tmp_path / f"x.{suffix}"), pa.ipc.IpcWriteOptions(compression="lz4")
    new = pa.ipc.new_file if suffix == "feather" else pa.ipc.new_stream
    with new(path, table.schema, options=options) as writer:
        writer.write_table(table, 1024)
    assert os.path.getsize(path) < arrays["z"].nbytes / 10
    code = """if True:
        import sys
        import pyarrow as pa
        from ce_fast import files
        for key in ("ids", "z"):
            source = files.open_source(sys.argv[1], key)
            sums = [int(files.rows(source, start, start + 512).sum()) for start in range(0, 4096, 512)]
            print(sum(sums), pa.default_memory_pool().max_memory())
        """  # in a process of its own: the maximum is of all its life
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True, text=True)
    (ids, ids_peak), (z, z_peak) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert (ids, z) == (arrays["ids"].sum(), 0)
    assert ids_peak < 1 << 20 and 4 << 20 <= z_peak < 6 << 20


def test_columns_of_labels_come_back(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    words = ["law", "art", "law"]
    table = pa.table({"plain": words, "dictionary": pa.array(words).dictionary_encode(), "number": [3, 1, 2]})
    path = str(tmp_path / "meta.parquet")
    pq.write_table(table, path)
    for key in ("plain", "dictionary"):
        assert files.rows(files.open_source(f"{path}::{key}"), 0, 3).tolist() == words
    assert files.rows(files.open_source(path, "number"), 1, 3).tolist() == [1, 2]


# --- Keys and patterns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("npz", "safetensors", "parquet", "feather"))
def test_a_key_chooses_among_several_and_a_missing_one_lists_them(tmp_path, rng, kind):
    arrays = {"ids": rng.integers(0, 9, (6, 2)), "z": rng.normal(size=(6, 2))}
    path = write(tmp_path / "x", arrays, kind)
    for key, array in arrays.items():
        same(in_batches(files.open_source(f"{path}::{key}"), 4), array)
        same(in_batches(files.open_source(path, key), 4), array)
    same(in_batches(files.open_source(f"{path}::z", "ids"), 4), arrays["z"])
    with pytest.raises(ValueError, match=r"holds 2 arrays; name one, as .*::KEY; it has 'ids', 'z'"):
        files.open_source(path)
    with pytest.raises(ValueError, match=r"has no key 'logits'; it has 'ids', 'z'"):
        files.open_source(f"{path}::logits")


def test_a_npy_file_has_no_keys(tmp_path):
    path = write(tmp_path / "x", {"x": np.zeros(3)}, "npy")
    with pytest.raises(ValueError, match="one array without a name"):
        files.open_source(f"{path}::x")


def test_files_of_a_pattern_are_joined_in_natural_order(tmp_path, rng):
    parts = [rng.normal(size=(n, 3)) for n in (4, 1, 0, 7)]
    for i, (number, part) in enumerate(zip((1, 2, 9, 10), parts, strict=True)):
        write(tmp_path / f"part{number}", {"x": part}, ("npy", "npz", "npy", "compressed.npz")[i])
    source = files.open_source(str(tmp_path / "part*"))
    whole = np.concatenate(parts)
    assert source.shape == (12, 3) and [path.rpartition("part")[2][:2] for path in source.paths][-1] == "10"
    for size in (1, 2, 5, 12):
        same(in_batches(source, size), whole)
    same(files.rows(source, 3, 11), whole[3:11])


def test_labels_of_several_files_may_differ_in_length(tmp_path):
    for i, words in enumerate((["law", "art"], ["physics"])):
        np.save(tmp_path / f"{i}\u00b2.npy", words)
    source = files.open_source(str(tmp_path / "*.npy"))
    assert files.rows(source, 0, 3).tolist() == ["law", "art", "physics"]


def test_a_file_whose_name_looks_like_a_pattern_or_a_key_is_that_file(tmp_path, rng):
    array = rng.normal(size=(3, 2))
    for name in ("run[1].npy", "a::b.npy"):
        np.save(tmp_path / name, array)
        same(in_batches(files.open_source(str(tmp_path / name)), 2), array)


def test_files_that_do_not_fit_together_are_named(tmp_path):
    np.save(tmp_path / "a1.npy", np.zeros((3, 4)))
    np.save(tmp_path / "a2.npy", np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"a2\.npy has shape \(3, 5\) .*a1\.npy shape \(3, 4\)"):
        files.open_source(str(tmp_path / "a*.npy"))


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.npy: no such file"):
        files.open_source(str(tmp_path / "x.npy"))
    with pytest.raises(FileNotFoundError, match=r"\*\.npy: no file matches"):
        files.open_source(str(tmp_path / "*.npy"))
    with pytest.raises(ValueError, match="is a directory; expected a file"):
        files.open_source(str(tmp_path))
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"unknown kind of file '\.pt'; expected one of \.npy"):
        files.open_source(str(tmp_path / "x.pt"))


# --- Damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NUMPY_FORMATS + ARROW_FORMATS)
def test_a_truncated_file_is_told_with_its_name(tmp_path, rng, kind):
    path = write(tmp_path / "x", {"x": rng.normal(size=(2000, 16))}, kind)
    with open(path, "rb") as file:
        whole = file.read()
    for left in (0, 3, 40, len(whole) // 2, len(whole) - 20):
        with open(path, "wb") as file:
            file.write(whole[:left])
        with pytest.raises((ValueError, OSError), match=r"x\.\w+"):
            in_batches(files.open_source(path), 100)


def test_a_npy_file_shorter_than_its_header_says_by_how_much(tmp_path):
    path = write(tmp_path / "x", {"x": np.zeros((4, 3))}, "npy")
    with open(path, "r+b") as file:
        file.truncate(200)
    with pytest.raises(ValueError, match=r"truncated: the file has 200 bytes, and shape \(4, 3\) .* ends at byte 224"):
        files.open_source(path)


def test_a_compressed_member_that_was_changed_is_damaged(tmp_path, rng):
    path = write(tmp_path / "x", {"x": rng.normal(size=(500, 16))}, "compressed.npz")
    with zipfile.ZipFile(path) as archive:
        place = archive.infolist()[0].header_offset + 30_000
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"\x00" * 64)
    with pytest.raises(ValueError, match=r"x\.npz::x: damaged"):
        in_batches(files.open_source(path), 100)


@pytest.mark.parametrize("kind", (*NUMPY_FORMATS, *ARROW_FORMATS, "lists.parquet", "lists.feather", "lists.arrow"))
@pytest.mark.filterwarnings("ignore")
def test_whatever_bytes_are_damaged_the_file_is_read_or_told_by_its_name(tmp_path, rng, kind):
    path = write(tmp_path / "x", {"x": rng.normal(size=(40, 7)).astype(np.float32)}, kind)
    with open(path, "rb") as file:
        whole = file.read()
    ends = np.r_[: min(400, len(whole)), max(0, len(whole) - 700) : len(whole)]  # where headers and footers are
    told = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for place in rng.choice(ends, rng.integers(1, 3)):
            damaged[place] = rng.choice((0, 0xFF, damaged[place] ^ 1 << rng.integers(8), rng.integers(256)))
        with open(path, "wb") as file:
            file.write(damaged)
        try:
            source = files.open_source(path)
            files.rows(source, 0, min(source.shape[0], 100))
        except ValueError as error:
            told += 1
            assert path in str(error)
    assert told


@pytest.mark.parametrize(
    ("place", "bits", "words"), [(6, 0x20, "patched"), (6, 1, "encrypted"), (6, 0x40, "strong encryption"),
     (8, 77, "compression method")],
)  # fmt: skip
def test_members_that_zipfile_does_not_read_are_told(tmp_path, place, bits, words):
    path = write(tmp_path / "x", {"x": np.zeros((4, 3))}, "npz")
    with open(path, "rb") as file:
        damaged = bytearray(file.read())
    for begin, shift in ((0, 0), (damaged.index(b"PK\1\2"), 2)):  # of the member, and of the directory
        damaged[begin + place + shift] |= bits
    with open(path, "wb") as file:
        file.write(damaged)
    with pytest.raises(ValueError, match=rf"x\.npz: damaged, or of a format that is not read: .*{words}"):
        files.open_source(path)


def test_a_header_that_is_no_python_is_damaged(tmp_path):
    path = write(tmp_path / "x", {"x": np.zeros((4, 3))}, "npy")
    with open(path, "r+b") as file:
        file.seek(10)
        file.write(b"(")  # tokenize.TokenError
    with pytest.raises(ValueError, match=r"x\.npy: damaged"):
        files.open_source(path)


def test_a_member_that_is_shorter_than_its_header_says_does_not_read_the_next(tmp_path):
    npy = write(tmp_path / "x", {"x": np.zeros((4, 3))}, "npy")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive, open(npy, "rb") as file:
        archive.writestr("x.npy", file.read().replace(b"(4, 3)", b"(9, 3)"))
        archive.write(npy, "y.npy")
    with pytest.raises(ValueError, match=r"x\.npz::x: truncated: 224 bytes; .* ends at byte 344"):
        files.open_source(f"{tmp_path}/x.npz", "x")


@pytest.mark.parametrize("kind", ("npy", "npz", "compressed.npz"))
def test_pickled_objects_are_refused(tmp_path, kind):
    path = write(tmp_path / "x", {"x": np.array([{"a": 1}, None])}, kind)
    with pytest.raises(ValueError, match="pickled Python objects"):
        files.open_source(path)


def test_a_scalar_has_no_rows(tmp_path):
    np.save(tmp_path / "x.npy", 1.0)
    with pytest.raises(ValueError, match=r"x\.npy is a scalar; expected an array with rows"):
        files.open_source(str(tmp_path / "*.npy"))


def test_a_compressed_array_in_fortran_order_is_refused(tmp_path):
    path = write(tmp_path / "x", {"x": np.asfortranarray(np.ones((3, 4)))}, "compressed.npz")
    with pytest.raises(ValueError, match="compressed in Fortran order"):
        files.open_source(path)


def test_a_dtype_of_safetensors_that_no_array_has_is_refused(tmp_path):
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    pytest.importorskip("safetensors")
    with pytest.raises(ValueError, match="has dtype F8_E4M3; expected one of F64"):
        files.open_source(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("kind", ("feather", "arrow"))
def test_a_length_below_zero_does_not_abort_the_process(tmp_path, rng, kind):
    path = write(tmp_path / "x", {"x": rng.normal(size=(4, 4321))}, kind)
    with open(path, "rb") as file:
        whole = file.read()
    assert struct.pack("<q", 4 * 4321) in whole  # of the values, below the lists
    with open(path, "wb") as file:
        file.write(whole.replace(struct.pack("<q", 4 * 4321), struct.pack("<q", -5)))
    with pytest.raises(ValueError, match=r"x\.\w+::x: damaged"):
        in_batches(files.open_source(path), 2)


@pytest.mark.parametrize("values", ([[1.0, 2.0], None], [[1.0, 2.0], [3.0, None]], [[1.0, 2.0], [3.0]]), ids=str)
def test_columns_with_nulls_or_of_several_lengths_are_refused(tmp_path, values):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"x": values}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet::x") as told:
        in_batches(files.open_source(str(tmp_path / "x.parquet")), 2)
    assert "damaged" not in str(told.value)


def test_columns_of_structures_are_refused(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"x": [{"a": 1}]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x is a column of struct"):
        files.open_source(str(tmp_path / "x.parquet"))


def test_what_is_written_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "numbers.json"
    files.write_whole(path, "old")

    def fail(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        files.write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["numbers.json"]


def test_a_link_that_is_written_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "numbers.json")
    for text in ("first", "second"):
        files.write_whole(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "numbers.json").read_text() == text
    assert sorted(os.listdir(tmp_path)) == ["link", "numbers.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("linked", (False, True))
def test_a_pipe_is_written_to_and_not_replaced(tmp_path, linked):
    path = pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    if linked:
        path = tmp_path / "link"
        path.symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        files.write_whole(path, "text")
        assert os.read(reader, 100) == b"text" and stat.S_ISFIFO(os.stat(path).st_mode)
    finally:
        os.close(reader)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd/1"), reason="the system has no /proc")
def test_a_link_to_the_standard_output_is_written_to(tmp_path):
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")  # as /dev/stdout is
    code = "import sys; from ce_fast import files; files.write_whole(sys.argv[1], 'text')"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "stdout")], capture_output=True, check=True)
    assert done.stdout == b"text" and (tmp_path / "stdout").is_symlink()
