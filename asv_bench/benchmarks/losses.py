"""Time of the losses: shapes, dtypes, options, gradients."""

import numpy as np

import ce_fast
from ce_fast import measure, workloads

SHAPES = {
    "256x50257": ((256, 50257), None),
    "8192x1000": ((8192, 1000), None),
    "1000000x10": ((1_000_000, 10), None),
    "1000000x2": ((1_000_000, 2), None),
    "2x21x512x512": ((2, 21, 512, 512), 1),
}
LONG = (256, 50257)


def _logits(shape, dtype="float32", class_axis=-1):
    if dtype == "bfloat16" and not workloads.installed("ml_dtypes"):
        raise NotImplementedError("ml_dtypes is not installed")
    return workloads.make_logits(shape, dtype, class_axis)


class Shapes:
    params = tuple(SHAPES)
    param_names = ("shape",)

    def setup(self, name):
        shape, class_axis = SHAPES[name]
        self.logits, self.target = _logits(shape, class_axis=-1 if class_axis is None else class_axis)
        self.loss = ce_fast.CrossEntropyLoss(class_axis=class_axis)
        self.grad = np.empty_like(self.logits)

    def time_forward(self, name):
        self.loss(self.logits, self.target)

    def time_value_and_grad(self, name):
        self.loss.value_and_grad(self.logits, self.target, out=self.grad)


class Spread:
    """Logits spread over 200: most terms and gradients would be subnormal, each a hundred times as long."""

    params = (tuple(SHAPES), (5, 200))
    param_names = ("shape", "spread")

    def setup(self, name, spread):
        shape, class_axis = SHAPES[name]
        self.logits, self.target = _logits(shape, class_axis=-1 if class_axis is None else class_axis)
        self.logits *= spread / np.ptp(self.logits)
        self.loss = ce_fast.CrossEntropyLoss(class_axis=class_axis)
        self.grad = np.empty_like(self.logits)

    def time_forward(self, name, spread):
        self.loss(self.logits, self.target)

    def time_value_and_grad(self, name, spread):
        self.loss.value_and_grad(self.logits, self.target, out=self.grad)


class Dtypes:
    params = ("float64", "float16", "bfloat16")  # float32 is among the shapes
    param_names = ("dtype",)

    def setup(self, dtype):
        logits, self.target = _logits(LONG, "float32" if dtype == "float16" else dtype)
        self.logits = logits.astype(np.float16) if dtype == "float16" else logits
        self.loss = ce_fast.CrossEntropyLoss()
        self.grad = np.empty_like(self.logits)

    def time_forward(self, dtype):
        self.loss(self.logits, self.target)

    def time_value_and_grad(self, dtype):
        self.loss.value_and_grad(self.logits, self.target, out=self.grad)


class Options:
    """What each option costs, of a loss with its gradient; "in place" and "none" are to compare with."""

    params = (
        "none", "in place", "weight", "smoothing", "z_loss", "temperature", "softcap", "ignored half", "sample_weight",
        "soft target",
    )  # fmt: skip
    param_names = ("option",)

    def setup(self, option):
        self.logits, self.target = _logits(LONG)
        n_rows, n_classes = LONG
        options = {
            "weight": {"weight": np.linspace(0.5, 2.0, n_classes)},
            "smoothing": {"label_smoothing": 0.1},
            "z_loss": {"z_loss": 1e-4},
            "temperature": {"temperature": 2.0},
            "softcap": {"softcap": 30.0},
        }
        self.loss = ce_fast.CrossEntropyLoss(**options.get(option, {}))
        self.sample_weight = np.linspace(0.5, 2.0, n_rows) if option == "sample_weight" else None
        if option == "ignored half":
            self.target[::2] = -100
        if option == "soft target":
            self.target = np.full(LONG, 1 / n_classes, np.float32)
        self.grad = self.logits if option == "in place" else np.empty_like(self.logits)

    def time_value_and_grad(self, option):
        self.loss.value_and_grad(self.logits, self.target, self.sample_weight, out=self.grad)


class Rules:
    """Losses of the same rows; a smoothed rule takes its terms class by class."""

    params = (
        ("FocalLoss", "PolyLoss", "GeneralizedCrossEntropyLoss", "KLDivLoss"),
        ("hard", "smoothed"),
    )
    param_names = ("loss", "target")

    def setup(self, name, kind):
        self.logits, self.target = _logits(LONG)
        options = {"label_smoothing": 0.1} if kind == "smoothed" else {}
        if name == "KLDivLoss":
            if options:
                raise NotImplementedError("it has no target to smooth")
            self.target = np.roll(self.logits, 1, axis=0)
        self.loss = getattr(ce_fast, name)(**options)
        self.grad = np.empty_like(self.logits)

    def time_value_and_grad(self, name, kind):
        self.loss.value_and_grad(self.logits, self.target, out=self.grad)


class Backends:
    params = ("compiled", "numba")
    param_names = ("backend",)

    def setup(self, backend):
        try:
            with ce_fast.use_backend(backend):
                ce_fast.cross_entropy(*_logits((64, 1024)))  # compiles
        except ImportError as error:
            raise NotImplementedError(str(error)) from error
        self.logits, self.target = _logits(LONG)

    def time_forward(self, backend):
        with ce_fast.use_backend(backend):
            ce_fast.cross_entropy(self.logits, self.target)


class Threads:
    params = (1, 2, 4)
    param_names = ("n_threads",)

    def setup(self, n_threads):
        if n_threads > measure.thread_count():
            raise NotImplementedError("more threads than this machine gives")
        self.logits, self.target = _logits(LONG)
        self.loss = ce_fast.CrossEntropyLoss(n_threads=n_threads)

    def time_forward(self, n_threads):
        self.loss(self.logits, self.target)


class OneRow:
    params = (1, 2, 4)
    param_names = ("n_threads",)

    def setup(self, n_threads):
        if n_threads > measure.thread_count():
            raise NotImplementedError("more threads than this machine gives")
        self.logits, self.target = _logits((1, 152064))
        self.loss = ce_fast.CrossEntropyLoss(n_threads=n_threads)
        self.grad = np.empty_like(self.logits)

    def time_forward(self, n_threads):
        self.loss(self.logits, self.target)

    def time_value_and_grad(self, n_threads):
        self.loss.value_and_grad(self.logits, self.target, out=self.grad)


class Transforms:
    def setup(self):
        self.logits, _ = _logits(LONG)
        self.out = np.empty_like(self.logits)

    def time_logsumexp(self):
        ce_fast.logsumexp(self.logits)

    def time_softmax(self):
        ce_fast.softmax(self.logits, out=self.out)

    def time_log_softmax(self):
        ce_fast.log_softmax(self.logits, out=self.out)
