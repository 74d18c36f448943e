"""What the examples share: options, texts, and training a model before and after, side by side."""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fastseq

#: How far apart the losses may be, in parts of the first one: in the first ten steps, when only
#: rounding differs, and at the end, when training has made it grow.
CLOSE, CLOSE_AT_END = 1e-4, 0.02
console = Console(highlight=False)
Step = Callable[[nn.Module, int], Tensor]


def options(description: str) -> argparse.Namespace:
    """``--quick`` for a few steps, ``--out`` for pictures; and the same numbers on every run."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    return chosen


def python_reference() -> dict[str, str]:
    """Python's own language reference, which comes with it: chapters by name."""
    from pydoc_data.topics import topics

    return {name: topics[name] for name in sorted(topics)}


def as_numbers(symbols: list[str], size: int | None = None) -> tuple[Tensor, list[str]]:
    """Symbols as numbers, and the vocabulary: all, or the ``size`` most frequent, 0 the others."""
    frequent = [symbol for symbol, _ in Counter(symbols).most_common(size and size - 1)]
    vocabulary = frequent if size is None else ["<other>", *frequent]
    number = {symbol: n for n, symbol in enumerate(vocabulary)}
    return torch.tensor([number.get(symbol, 0) for symbol in symbols]), vocabulary


PAD, BEGIN, END = range(3)


class MadeUpLanguage:
    """English sentences, and what they are in a language whose words are English backwards, whose
    adjectives stand behind their noun, the last first, and whose verbs come at the end."""

    adjectives = ("red", "old", "small", "quick", "quiet", "round")
    nouns = ("cat", "dog", "tree", "river", "house", "bird", "stone", "child")
    verbs = ("sees", "finds", "follows", "likes", "hears")

    def __init__(self) -> None:
        self.words = ["", "<", ">", "and", *self.adjectives, *self.nouns, *self.verbs]

    def sentence(self, draw: random.Random) -> tuple[list[str], list[str]]:
        """One or two clauses of 3 to 7 words, and their translation."""
        english: list[str] = []
        foreign: list[str] = []
        for clause in range(draw.randint(1, 2)):
            subject, thing = (draw.sample(self.adjectives, draw.randint(0, 2)) for _ in range(2))
            subject, thing = ([*phrase, draw.choice(self.nouns)] for phrase in (subject, thing))
            verb = draw.choice(self.verbs)
            also = ["and"] if clause else []
            english += [*also, *subject, verb, *thing]
            foreign += [*also, *reversed(subject), *reversed(thing), verb]
        return english, foreign

    def batch(self, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """``source [B, S]`` and ``target [B, T]``, each from BEGIN to END, filled up with PAD."""
        draw = random.Random(seed)
        pairs = [self.sentence(draw) for _ in range(size)]
        source, target = (
            [torch.tensor([BEGIN, *map(self.words.index, side), END]) for side in sides]
            for sides in zip(*pairs, strict=True)
        )
        return pad_sequence(source, True, PAD), pad_sequence(target, True, PAD)

    def write(self, tokens: Tensor, *, foreign: bool) -> list[str]:
        """The words behind BEGIN up to END."""
        numbers = takewhile(lambda n: n != END, tokens.tolist())
        words = [self.words[n] for n in numbers if n != BEGIN]
        return [word[::-1] for word in words] if foreign else words

    def share_right(self, translate: Callable[[Tensor, int], Tensor], size: int) -> float:
        """Of sentences not trained on, those without a fault in ``translate(source, length)``,
        which returns ``[B, length]`` words."""
        source, target = self.batch(size, -1)
        wanted = target[:, 1:]
        made = translate(source, wanted.shape[1])
        return ((made == wanted) | (wanted == PAD)).all(1).float().mean().item()


def pyplot() -> Any:
    """Matplotlib's pyplot, for pictures in files."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def compare(
    title: str,
    before: nn.Module,
    step: Step,
    *,
    steps: int,
    falls: float,
    quick: bool,
    after: nn.Module | None = None,
    learning_rate: float = 1e-3,
    clip: float | None = None,
) -> nn.Module:
    """Train a model as torch has it and as fastseq has it, on the same batches, taking turns.

    Args:
        title: of the table.
        before: the model of torch's parts.
        step: the loss of a model in step n, from the batch of that number.
        steps: how many.
        falls: the loss of the last tenth is below the first over this.
        quick: three steps, and no such demand.
        after: the model of fastseq's parts; None: ``fastseq.accelerate`` makes it.
        learning_rate: of Adam.
        clip: the largest norm of the gradients; None: any.

    Returns:
        The trained model of fastseq's parts.
    """
    if after is None:
        after = fastseq.accelerate(copy.deepcopy(before))
    after.load_state_dict(before.state_dict())
    models = {"torch": before, "fastseq": after}
    parameters = {name: list(model.parameters()) for name, model in models.items()}
    optimizers = {name: torch.optim.Adam(p, learning_rate) for name, p in parameters.items()}
    losses: dict[str, list[float]] = {name: [] for name in models}
    times: dict[str, list[float]] = {name: [] for name in models}
    for n in track(range(3 if quick else steps), f"{title:<28}", console=console):
        for name in sorted(models, reverse=n % 2 == 0):
            start = time.perf_counter()
            loss = step(models[name], n)
            optimizers[name].zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(parameters[name], clip)
            optimizers[name].step()
            times[name].append(time.perf_counter() - start)
            losses[name].append(loss.item())
    _report(title, losses, times, 0.0 if quick else falls)
    return after


def _report(
    title: str, losses: dict[str, list[float]], times: dict[str, list[float]], falls: float
) -> None:
    few = max(1, len(losses["torch"]) // 10)
    first = {name: values[0] for name, values in losses.items()}
    last = {name: statistics.mean(values[-few:]) for name, values in losses.items()}
    steps = len(losses["torch"])
    table = Table("", "ms a step", "first loss", "last tenth", title=f"{title}: {steps} steps")
    for name in losses:
        median = 1e3 * statistics.median(times[name][1:] or times[name])
        table.add_row(name, f"{median:.1f}", f"{first[name]:.4f}", f"{last[name]:.4f}")
    console.print(table)
    pairs = zip(times["torch"], times["fastseq"], strict=True)
    ratio = statistics.median([theirs / ours for theirs, ours in pairs][1:] or [1.0])
    apart = [
        abs(a - b) / first["torch"] for a, b in zip(losses["torch"], losses["fastseq"], strict=True)
    ]
    console.print(
        f"{ratio:.2f} times torch's speed\nlargest difference of the losses, in parts of the "
        f"first: {max(apart[:10]):.1e} in 10 steps, {max(apart):.1e} in all\n"
    )
    assert max(apart[:10]) < CLOSE, "the same model on the same batches has another loss"
    drift = abs(last["fastseq"] - last["torch"]) / first["torch"]
    assert drift < CLOSE_AT_END, f"the losses end {drift} of the first apart"
    assert last["fastseq"] * falls < first["fastseq"], f"it has not learned: {last} of {first}"
