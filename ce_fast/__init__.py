"""Cross-entropy losses and their gradients on the CPU: fast, exact, with no temporaries of the logits' size.

>>> import ce_fast as ce
>>> round(ce.cross_entropy([[2.0, 0.0, -1.0]], [0]), 6)
0.169846
"""

from ce_fast.adapters.numpy import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    distillation_loss,
    entropy,
    focal_loss,
    generalized_cross_entropy,
    kl_div,
    linear_cross_entropy,
    log_softmax,
    logsumexp,
    nll_loss,
    perplexity,
    poly_loss,
    sigmoid_focal_loss,
    softmax,
)
from ce_fast.backends import use_backend
from ce_fast.calibration import calibration_error, fit_temperature
from ce_fast.comparison import Comparison, ComparisonReport
from ce_fast.config import __version__, show_config
from ce_fast.distillation import DistillationLoss
from ce_fast.evaluation import EvalReport, Evaluator
from ce_fast.linear import LinearCrossEntropyLoss
from ce_fast.losses import (
    BCELoss,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    FocalLoss,
    GeneralizedCrossEntropyLoss,
    KLDivLoss,
    NLLLoss,
    PolyLoss,
    SigmoidFocalLoss,
)
from ce_fast.rows import RowStats, row_stats
from ce_fast.top_k import TopKTeacher

__all__ = [
    "BCELoss",
    "BCEWithLogitsLoss",
    "Comparison",
    "ComparisonReport",
    "CrossEntropyLoss",
    "DistillationLoss",
    "EvalReport",
    "Evaluator",
    "FocalLoss",
    "GeneralizedCrossEntropyLoss",
    "KLDivLoss",
    "LinearCrossEntropyLoss",
    "NLLLoss",
    "PolyLoss",
    "RowStats",
    "SigmoidFocalLoss",
    "TopKTeacher",
    "__version__",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "calibration_error",
    "cross_entropy",
    "distillation_loss",
    "entropy",
    "fit_temperature",
    "focal_loss",
    "generalized_cross_entropy",
    "kl_div",
    "linear_cross_entropy",
    "log_softmax",
    "logsumexp",
    "nll_loss",
    "perplexity",
    "poly_loss",
    "row_stats",
    "show_config",
    "sigmoid_focal_loss",
    "softmax",
    "use_backend",
]
