"""Cross-entropy in scikit-learn's words: losses, metrics, scorers, a display, a classifier."""

from ce_fast.adapters.sklearn_classifier import SoftmaxClassifier
from ce_fast.adapters.sklearn_display import ReliabilityDisplay
from ce_fast.adapters.sklearn_loss import cross_entropy_from_logits, log_loss
from ce_fast.adapters.sklearn_metrics import brier_score, calibration_error, d2_log_loss
from ce_fast.adapters.sklearn_scorer import make_cross_entropy_scorer, neg_cross_entropy_scorer

__all__ = [
    "ReliabilityDisplay",
    "SoftmaxClassifier",
    "brier_score",
    "calibration_error",
    "cross_entropy_from_logits",
    "d2_log_loss",
    "log_loss",
    "make_cross_entropy_scorer",
    "neg_cross_entropy_scorer",
]
