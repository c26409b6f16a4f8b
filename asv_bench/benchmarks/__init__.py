"""The asv suite. A host that is not installed skips its benchmarks: `setup` raises NotImplementedError."""

import os

QUICK = bool(os.environ.get("CE_FAST_QUICK"))  # that all of it runs, and no more; asv's --quick does not reach `track_`


def shape_of(workload):
    """Of its input: a quarter of the rows in a quick pass."""
    return workload.quick_shape if QUICK else workload.shape
