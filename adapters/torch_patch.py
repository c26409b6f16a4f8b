"""torch's own loss functions with our kernels inside, for code that calls them and that nobody can edit.

`patch` gives the function objects of `torch.nn.functional` another body, and no attribute another value. So they stay
what they were for all who hold, compare, look up or pickle them: names bound by `from ... import`, overrides of
`__torch_function__`, the tables of `torch.compile`; and patches are undone in any order, other people's too.
"""

import functools
import inspect
import threading
import types
from typing import Any

import torch.nn.functional as F

_NAMES = (
    "cross_entropy",
    "nll_loss",
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy",
    "kl_div",
    "linear_cross_entropy",  # torch 2.13 has it
)


def _is_torchs(function: Any) -> bool:
    """Not so what somebody else has put in place of torch's function, which is left to them."""
    plain = isinstance(function, types.FunctionType) and function.__closure__ is None
    return plain and function.__globals__ is vars(F)


def _copy(function: types.FunctionType) -> types.FunctionType:
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    return made


_found = {name: getattr(F, name) for name in _NAMES if hasattr(F, name)}
_torchs = {name: f for name, found in _found.items() if _is_torchs(f := inspect.unwrap(found))}
# what the adapter falls back on: under a patch, torch's functions would come back to it
own = types.SimpleNamespace(**_found | {name: _copy(f) for name, f in _torchs.items()})
_ours: dict[str, Any] = {}
_active: set["patch"] = set()
_lock = threading.Lock()

_BODY = """
def {name}({parameters}):
    from ce_fast.adapters.torch_patch import _ours, own

    if not has_torch_function_variadic({names}):
        try:
            return _ours["{name}"]({given})
        except (IndexError, RuntimeError, TypeError, ValueError):
            pass  # torch says what is wrong, or takes it
    return own.{name}({given})
"""


@functools.cache  # torch.compile guards it: another one each time would be compiled each time
def _body(function: types.FunctionType) -> types.CodeType:
    """Of torch's parameters, which torch.compile remembers; it runs among the names of `torch.nn.functional`."""
    code, made = function.__code__, {}  # type: ignore[var-annotated]
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    positional, keywords = names[: code.co_argcount], names[code.co_argcount :]
    parameters = ", ".join([*positional, *(["*"] if keywords else []), *keywords])
    given = ", ".join([*positional, *(f"{name}={name}" for name in keywords)])
    exec(_BODY.format(name=function.__name__, parameters=parameters, names=", ".join(names), given=given), made)
    return made[function.__name__].__code__


class patch:
    """Torch's own losses of CPU tensors by our kernels, until `undo()` or the end of a `with` block.

    `cross_entropy`, `nll_loss`, `binary_cross_entropy_with_logits`, `binary_cross_entropy`, `kl_div` and, where torch
    has it, `linear_cross_entropy` of `torch.nn.functional` are then those of `ce_fast.adapters.torch`, for every
    caller: `torch.nn.CrossEntropyLoss` and the other modules, whenever made; names bound by `from ... import`; a
    `transformers.Trainer`.

    Raises
    ------
    RuntimeError
        If a patch that is undone is entered.

    Notes
    -----
    - Results are those of `ce_fast.adapters.torch`, in nats. All that its functions refuse, and all that their kernels
      do not see, is torch's, with torch's errors. Calls that `__torch_function__` overrides are theirs to see. Ours
      take class indices of any integer dtype, and warn of logits that look like probabilities.
    - A call costs 1 us more than one of `ce_fast.adapters.torch`.
    - The whole process is patched, all its threads, as by any such change; processes that it spawns are not.
    - Patches nest, each `patch()` being one of its own, and end in any order: torch has its own functions back when no
      patch is left. `undo()` a second time does nothing.
    - The functions get another body and stay the same objects. What `torch.compile` compiled follows, by compiling once
      more; what `torch.jit` compiled stays as it was.
    - The gradient of reduction="none", and of a scaled loss of 16-bit logits, is computed from the logits in backward:
      changing them in place between is then an error, where torch has saved their log-softmax.
    - `binary_cross_entropy` of NaN is NaN, where torch raises.
    - A function that somebody else had replaced before this module was imported is left to them, but for one with a
      `__wrapped__`, as `functools.wraps` leaves, which leads to torch's.

    Examples
    --------
    >>> import torch
    >>> from ce_fast.adapters.torch import patch
    >>> loss, input = torch.nn.CrossEntropyLoss(), torch.tensor([[20.0, 0.0, 0.0]])
    >>> loss(input, torch.tensor([0]))  # of which float32 has lost most digits
    tensor(0.)
    >>> with patch():
    ...     loss(input, torch.tensor([0]))
    tensor(4.1223e-09)
    >>> patched = patch()
    >>> loss(input, torch.tensor([0]))
    tensor(4.1223e-09)
    >>> patched.undo()
    >>> loss(input, torch.tensor([0]))
    tensor(0.)
    """

    def __init__(self) -> None:
        from ce_fast.adapters import torch as adapter  # which imports this module

        with _lock:
            if not _active:
                for name, function in _torchs.items():
                    _ours[name] = getattr(adapter, name).__wrapped__  # overrides see torch's function, not ours
                    function.__wrapped__ = getattr(own, name)  # whose source torch.jit.script reads
                    function.__code__ = _body(function)
            _active.add(self)

    def undo(self) -> None:
        """End this patch. Torch has its own bodies again once no patch is left; a second time does nothing."""
        with _lock:
            if self in _active:
                _active.remove(self)
                if not _active:
                    for name, function in _torchs.items():
                        function.__code__ = getattr(own, name).__code__
                        del function.__wrapped__

    def __enter__(self) -> "patch":
        if self not in _active:
            raise RuntimeError("this patch is undone; patch() makes another one")
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<patch of {', '.join(_torchs)}: {'active' if self in _active else 'undone'}>"
