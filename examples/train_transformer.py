"""A small language model learns Python from the standard library, three times from the same seed: by torch's
`cross_entropy`, by ours, and by our `linear_cross_entropy`, which never holds the logits of all tokens.

    python examples/train_transformer.py [--steps 100] [--vocabulary 32000] [--short]

The three loss curves are the same but for float32 rounding, which is asserted. What differs is printed in one table:
how long a step takes, how much of it is the unembedding and the loss, and how far memory grows. With a vocabulary of
32,000 the logits of a batch are larger than the model; with --short (128 characters, 5 steps) nothing is.
"""

import argparse
import multiprocessing
import re
import statistics
import sysconfig
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ce_fast.adapters.torch import cross_entropy, linear_cross_entropy
from ce_fast.measure import peak_growth

WIDTH, HEADS, LAYERS = 128, 4, 2
BATCH, LENGTH = 16, 128  # tokens: 2048 a step
TOLERANCE = 1e-4  # nats; in 100 steps with a vocabulary of 4000 the curves came apart by 1e-6, one rounding of float32

# (hidden states, unembedding, target) -> the mean loss
LOSSES = {
    "torch cross_entropy": lambda hidden, weight, target: F.cross_entropy(F.linear(hidden, weight), target),
    "ce_fast cross_entropy": lambda hidden, weight, target: cross_entropy(F.linear(hidden, weight), target),
    "ce_fast linear_cross_entropy": linear_cross_entropy,
}


def standard_library(n_classes: int) -> tuple[np.ndarray, int]:
    """(tokens, number of distinct ones): the most frequent words, and characters for what is left."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "\n".join(path.read_text("utf-8") for path in files).encode("ascii", "replace").decode()
    words = re.findall(r"\w+|\s+|[^\w\s]", text)
    frequent = [word for word, _ in Counter(words).most_common() if len(word) > 1]
    pieces = [chr(i) for i in range(128)] + frequent[: n_classes - 128]
    number = {piece: i for i, piece in enumerate(pieces)}
    tokens = [number[piece] for word in words for piece in ([word] if word in number else word)]
    return np.array(tokens), len(pieces)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.mix(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2))
        return x + self.feed(self.norms[1](x))


class Transformer(nn.Module):
    """From tokens to hidden states: `unembedding` makes logits of them, or does not."""

    def __init__(self, n_classes: int):
        super().__init__()
        self.embedding, self.position = nn.Embedding(n_classes, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH))
        self.unembedding = nn.Linear(WIDTH, n_classes, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.blocks(self.embedding(tokens) + self.position.weight)


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)  # nats a token
    steps: list[float] = field(default_factory=list)  # seconds
    heads: list[float] = field(default_factory=list)  # of those, seconds of the unembedding and the loss, both ways
    grown: int | None = None  # bytes


def train(name: str, tokens: np.ndarray, n_classes: int, n_steps: int) -> Run:
    """One run, in a process of its own."""
    torch.manual_seed(0)
    model, text, run = Transformer(n_classes), torch.from_numpy(tokens), Run()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def steps() -> list[float]:
        for _ in range(n_steps):
            window = text[torch.randint(len(text) - LENGTH, (BATCH, 1)) + torch.arange(LENGTH + 1)]
            started = time.perf_counter()
            hidden = model(window[:, :-1])
            leaf = hidden.detach().requires_grad_()  # cut here, so that the two halves can be timed
            at_head = time.perf_counter()
            loss = LOSSES[name](leaf.flatten(0, 1), model.unembedding.weight, window[:, 1:].flatten())
            loss.backward()
            run.heads.append(time.perf_counter() - at_head)
            hidden.backward(leaf.grad)
            optimizer.step()
            optimizer.zero_grad()
            run.steps.append(time.perf_counter() - started)
            run.losses.append(loss.item())
        return run.losses

    run.grown = peak_growth(steps)
    return run


def show(runs: dict[str, Run]) -> None:
    n_steps = len(runs["torch cross_entropy"].losses)
    at = sorted({0, n_steps // 4, n_steps // 2, 3 * n_steps // 4, n_steps - 1})
    print(f"{'loss at step, in nats':<30}", *(f"{i:9d}" for i in at))
    for name, run in runs.items():
        print(f"{name:<30}", *(f"{run.losses[i]:9.5f}" for i in at))
    print(f"\n{'':<30} ms a step   of it unembedding and loss   memory grows by, MiB")
    for name, run in runs.items():
        step, head = (1e3 * statistics.median(seconds) for seconds in (run.steps, run.heads))
        grown = "unknown" if run.grown is None else f"{run.grown / 2**20:.0f}"
        print(f"{name:<30} {step:9.1f} {head:28.1f} {grown:>23}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--vocabulary", type=int, default=32000, help="at least 128, one for each character")
    parser.add_argument("--short", action="store_true", help="5 steps with a vocabulary of 128")
    given = parser.parse_args()
    n_steps, wanted = (5, 128) if given.short else (given.steps, given.vocabulary)
    if n_steps < 1 or wanted < 128:
        parser.error(f"steps are {n_steps} and the vocabulary is {wanted}; expected at least 1 and 128")

    tokens, n_classes = standard_library(wanted)
    print(f"{len(tokens)} tokens, {n_classes} distinct; {n_steps} steps of {BATCH} x {LENGTH} tokens\n")
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:  # a process a run, one after the other
        runs = {name: pool.submit(train, name, tokens, n_classes, n_steps).result() for name in LOSSES}
    show(runs)

    curves = np.array([run.losses for run in runs.values()])
    difference = np.abs(curves[1:] - curves[0]).max()
    print(f"\nlargest difference from torch's curve: {difference:.1e} nats")
    assert difference < TOLERANCE, "the losses are not the same function"
    assert n_steps < 2 or curves[0, -1] < curves[0, 0], "nothing is learned"


if __name__ == "__main__":
    main()
