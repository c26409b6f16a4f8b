"""The main jobs, on real data and without a download: python -m ce_fast.demo.

Model selection in scikit-learn, evaluation of a language model's logits, training in torch, and the ratio table. Every
number printed is computed here and now; a section whose host is not installed says what to install.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

import ce_fast
from ce_fast import bench, measure, workloads


def missing(*modules: str) -> bool:
    """Whether one of `modules` is not installed; if so, print what to install."""
    absent = [name for name in modules if not workloads.installed(name)]
    if absent:
        print(f"skipped, for {' and '.join(absent)} cannot be imported: pip install 'ce_fast[demo]'")
    return bool(absent)


def _timed(call: Callable):
    """(what it returns, seconds)"""
    started = time.perf_counter()
    result = call()
    return result, time.perf_counter() - started


@dataclass(frozen=True)
class Search:
    """Two grid searches over the same candidates: ours, and scikit-learn's "neg_log_loss"."""

    choices: tuple[dict, dict]
    difference: float  # the largest, between the mean test scores


def grid_search(n_samples: int | None = None, folds: int = 5) -> Search | None:
    """Choose C of a logistic regression on the digits by our scorer and by "neg_log_loss".

    Parameters
    ----------
    n_samples : int, optional
        All 1797 by default.
    folds : int, default=5

    Returns
    -------
    Search or None
        None without scikit-learn.
    """
    if missing("sklearn"):
        return None
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from ce_fast.adapters import sklearn as adapter

    features, labels = (data[:n_samples] for data in load_digits(return_X_y=True))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    grid = {"logisticregression__C": [0.003, 0.03, 0.3, 3.0]}
    print(f"logistic regression on {len(labels)} digits, 4 values of C, {folds} folds")
    print(f"{'scoring':<26}{'chosen C':>9}{'its score':>13}{'search s':>10}")
    searches = []
    for name, scoring in ("neg_cross_entropy_scorer", adapter.neg_cross_entropy_scorer), ("neg_log_loss",) * 2:
        search, seconds = _timed(partial(GridSearchCV(model, grid, scoring=scoring, cv=folds).fit, features, labels))
        searches.append(search)
        print(f"{name:<26}{search.best_params_[next(iter(grid))]:>9}{search.best_score_:>13.9f}{seconds:>10.2f}")
    ours, theirs = (search.cv_results_["mean_test_score"] for search in searches)
    found = Search((searches[0].best_params_, searches[1].best_params_), float(np.abs(ours - theirs).max()))
    print(f"same choice: {found.choices[0] == found.choices[1]}; largest difference of a score: {found.difference:.1e}")

    probabilities = searches[0].predict_proba(features)
    calls: workloads.Calls = {
        "ce_fast": partial(adapter.log_loss, labels, probabilities),
        "scikit-learn": partial(log_loss, labels, probabilities),
    }
    times = ", ".join(f"{name} {1e6 * seconds:.0f} us" for name, seconds in measure.medians(calls, repeats=5).items())
    print(f"log_loss alone, on the same {list(probabilities.shape)} probabilities: {times}")
    return found


def make_language_logits(n_rows: int, n_classes: int, block: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """bfloat16 logits as a language model's, and the classes that came true.

    Made block by block: a float32 copy of the whole never exists.

    Returns
    -------
    logits : bfloat16 ndarray of shape (n_rows, n_classes)
        Normal of standard deviation 2, and more for the class that came true.
    target : int64 ndarray of shape (n_rows,)
    """
    import ml_dtypes

    rng = np.random.default_rng(0)
    target = rng.integers(n_classes, size=n_rows)
    logits = np.empty((n_rows, n_classes), ml_dtypes.bfloat16)
    for start in range(0, n_rows, block):
        drawn = 2 * rng.standard_normal((min(block, n_rows - start), n_classes), dtype=np.float32)
        rows = np.arange(len(drawn))
        drawn[rows, target[start : start + block]] += rng.normal(9, 4, len(drawn))
        logits[start : start + block] = drawn
    return logits, target


def by_blocks(logits: np.ndarray, target: np.ndarray, block: int = 64) -> tuple[float, float]:
    """(perplexity, accuracy) in plain NumPy and float64: what the others must agree with."""
    loss, right = 0.0, 0
    for start in range(0, len(logits), block):
        x, t = logits[start : start + block].astype(np.float64), target[start : start + block]
        top = x.max(axis=1)
        picked = x[np.arange(len(x)), t]
        right += int((x.argmax(axis=1) == t).sum())
        x -= top[:, None]
        loss += float((np.log(np.exp(x, out=x).sum(axis=1)) + top - picked).sum())
    return float(np.exp(loss / len(logits))), right / len(logits)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation of the same logits says, by who made it."""

    exact: float  # perplexity, float64
    perplexity: dict[str, float]
    growth: dict[str, int | None]  # bytes beyond the logits


def evaluate(n_rows: int = 4096, n_classes: int = 50257) -> Evaluation | None:
    """Perplexity of bfloat16 logits, and the memory it takes: ce_fast, and torch if it is installed.

    Parameters
    ----------
    n_rows, n_classes : int

    Returns
    -------
    Evaluation or None
        None without ml_dtypes.
    """
    if missing("ml_dtypes"):
        return None
    logits, target = make_language_logits(n_rows, n_classes)
    exact, accuracy = by_blocks(logits, target)
    print(f"bfloat16 logits {list(logits.shape)}, {logits.nbytes / measure.MIB:.0f} MiB; accuracy {accuracy:.4f}")
    calls = {"ce_fast": lambda: ce_fast.perplexity(logits, target)}
    if workloads.installed("torch"):
        import torch

        x, y = workloads.as_tensor(logits), torch.from_numpy(target)
        cross_entropy = torch.nn.functional.cross_entropy
        calls["torch, bfloat16"] = lambda: cross_entropy(x, y).double().exp().item()
        calls["torch, logits.float()"] = lambda: cross_entropy(x.float(), y).double().exp().item()
    print(f"{'':<22}{'perplexity':>12}{'ms':>8}{'memory beyond the logits':>26}")
    perplexities, growths = {}, {}
    for name, call in calls.items():
        growth = measure.peak_growth(call)
        perplexity, seconds = _timed(call)
        size = "not measurable here" if growth is None else f"{growth / measure.MIB:.2f} MiB"
        print(f"{name:<22}{perplexity:>12.4f}{1e3 * seconds:>8.0f}{size:>26}")
        perplexities[name], growths[name] = perplexity, growth
    print(f"{'NumPy, float64':<22}{exact:>12.4f}   (by blocks of rows, to compare with)")
    return Evaluation(exact, perplexities, growths)


@dataclass(frozen=True)
class Training:
    """One run: the loss at every step, the accuracy on the held-out digits, seconds."""

    losses: np.ndarray
    accuracy: float
    seconds: float


def _train(cross_entropy: Callable, data: tuple, steps: int, batch: int) -> Training:
    """An MLP by Adam; the same seed draws the same weights and batches whatever the loss."""
    import torch

    torch.manual_seed(0)
    train_x, test_x, train_y, test_y = data
    model = torch.nn.Sequential(torch.nn.Linear(train_x.shape[1], 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> float:
        rows = torch.randint(len(train_x), (batch,))
        loss = cross_entropy(model(train_x[rows]), train_y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    losses, seconds = _timed(lambda: np.array([step() for _ in range(steps)]))
    with torch.no_grad():
        accuracy = (model(test_x).argmax(dim=1) == test_y).float().mean().item()
    return Training(losses, accuracy, seconds)


def train(steps: int = 600, batch: int = 128) -> tuple[Training, Training] | None:
    """Train a small torch classifier on the digits with our cross-entropy and with torch's.

    Parameters
    ----------
    steps, batch : int

    Returns
    -------
    (ours, torch's) or None
        None without torch or scikit-learn, which has the digits.
    """
    if missing("torch", "ml_dtypes", "sklearn"):
        return None
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    from ce_fast.adapters import torch as adapter

    features, labels = load_digits(return_X_y=True)
    features = (features / 16).astype(np.float32)
    data = tuple(torch.from_numpy(part) for part in train_test_split(features, labels, random_state=0))
    functions = (adapter.cross_entropy, torch.nn.functional.cross_entropy)
    with measure.torch_threads(1):  # more make so small a network slower
        for function in functions:
            _train(function, data, 5, batch)  # what is loaded and started once is nobody's training time
        ours, theirs = (_train(function, data, steps, batch) for function in functions)
    print(f"MLP 64-128-10 on the digits, Adam, {steps} steps of {batch}, the same seed")
    print(f"{'step':>10}{'ce_fast':>13}{'torch':>13}")
    for i in np.linspace(0, steps - 1, 6).astype(int):
        print(f"{i + 1:>10}{ours.losses[i]:>13.8f}{theirs.losses[i]:>13.8f}")
    print(f"{'accuracy':>10}{ours.accuracy:>13.4f}{theirs.accuracy:>13.4f}")
    print(f"{'seconds':>10}{ours.seconds:>13.2f}{theirs.seconds:>13.2f}")
    print(f"largest difference of a loss: {np.abs(ours.losses - theirs.losses).max():.1e}")
    return ours, theirs


def ratios(names: Sequence[str] = ()) -> bench.Report:
    """The quick ratio table, of all workloads or of those named."""
    report = bench.run(names, quick=True)
    print(report.text())
    return report


SECTIONS: dict[str, Callable] = {
    "Model selection in scikit-learn": grid_search,
    "Evaluation of a language model's logits": evaluate,
    "Training in torch": train,
    "How fast, here and now (a quarter of the rows)": ratios,
}


def main() -> int:
    """Run all sections; returns the exit status."""
    started = time.perf_counter()
    for i, (title, section) in enumerate(SECTIONS.items(), start=1):
        print(f"\n{i}. {title}\n{'-' * (len(title) + 3)}")
        section()
    print(f"\nAll of this took {time.perf_counter() - started:.0f} seconds.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
