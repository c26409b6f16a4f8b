"""Cross-entropy in scikit-learn's words: a drop-in `log_loss`, the same from decision values, and scorers."""

from ce_fast.adapters.sklearn_loss import cross_entropy_from_logits, log_loss
from ce_fast.adapters.sklearn_scorer import make_cross_entropy_scorer, neg_cross_entropy_scorer

__all__ = ["cross_entropy_from_logits", "log_loss", "make_cross_entropy_scorer", "neg_cross_entropy_scorer"]
