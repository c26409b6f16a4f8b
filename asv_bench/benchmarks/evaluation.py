"""Evaluating a model from logits in a file: how fast, beside reading the file into memory, and in how much memory."""

import itertools
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import ce_fast
from ce_fast import measure, workloads

SHAPE = (2048, 32000)  # 125 MiB of bfloat16
BLOCK = 1 << 24  # bytes


def read(path, n_threads):
    """The file into memory, each thread its part of it, a block at a time."""
    size = Path(path).stat().st_size

    def part(first, last):
        block = memoryview(np.zeros(BLOCK, np.uint8))
        with open(path, "rb", buffering=0) as file:
            file.seek(first)
            while first < last:
                first += file.readinto(block[: last - first])

    ends = np.linspace(0, size, n_threads + 1).astype(int)
    threads = [threading.Thread(target=part, args=pair) for pair in itertools.pairwise(ends)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class File:
    def setup(self):
        if not workloads.installed("ml_dtypes"):
            raise NotImplementedError("ml_dtypes is not installed")
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "logits.npy")
        logits, self.target = workloads.make_logits(SHAPE, "bfloat16")
        np.save(self.path, logits)
        self.dtype = logits.dtype

    def teardown(self):
        self.folder.cleanup()

    def evaluate(self):
        logits = np.load(self.path, mmap_mode="r").view(self.dtype)
        evaluator = ce_fast.Evaluator()
        for first in range(0, SHAPE[0], 1024):
            evaluator.update(logits[first : first + 1024], self.target[first : first + 1024])
        return evaluator.compute()

    def time_evaluate(self):
        self.evaluate()

    def peakmem_evaluate(self):
        self.evaluate()

    def track_share_of_reading_speed(self):
        def seconds(call, *arguments):
            started = time.perf_counter()
            call(*arguments)
            return time.perf_counter() - started

        n_threads, turns = measure.thread_count(), range(5)
        pairs = [(seconds(read, self.path, n_threads), seconds(self.evaluate)) for _ in turns]
        return float(np.median([reading for reading, _ in pairs]) / np.median([ours for _, ours in pairs]))

    track_share_of_reading_speed.unit = "ratio"
