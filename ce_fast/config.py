"""What this installation runs on."""

import platform
import sys

import numpy as np

from ce_fast import backends, threads

__version__ = "0.1.0"


def show_config(mode: str = "stdout") -> dict | None:
    """Show the backend, instruction set, OpenMP, threads and versions that calls made now would use.

    Parameters
    ----------
    mode : {"stdout", "dicts"}, default="stdout"
        "stdout" prints; "dicts" returns a dictionary.

    Returns
    -------
    dict or None
        ``backend`` ("compiled" | "numba"), ``isa``, ``isas`` (all that could be chosen, worst first), ``openmp`` (its
        version date or False), ``threads``, ``versions``.

    Raises
    ------
    ValueError
        If `mode` is neither.

    Examples
    --------
    >>> import ce_fast as ce
    >>> sorted(ce.show_config(mode="dicts"))
    ['backend', 'isa', 'isas', 'openmp', 'threads', 'versions']
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode is {mode!r}; expected 'stdout' or 'dicts'")
    backend = backends.active()
    found = {
        "backend": backends.active_name(),
        **backend.config(),
        "threads": threads.resolve(None, threads.SERIAL_LOGITS, backend.max_threads),
        "versions": {
            "ce_fast": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            **{name: sys.modules[name].__version__ for name in ("numba", "sklearn", "torch") if name in sys.modules},
        },
    }
    if mode == "dicts":
        return found
    for key, value in found.items():
        print(f"{key:>9}: {value}")
    return None
