"""A convolutional network that says which chapter a passage comes from (Kim 2014).

Filters of three, four and five words slide over the passage; of each the strongest answer anywhere
counts. Convolution and pooling are torch's: fastseq has no kernels for them, and its libraries' are
good. What runs of fastseq is the norm of what was found and the loss, a small part of the time: do
not expect a gain here, but no loss and the same numbers.

    python examples/text_cnn.py
"""

import re

import torch
from _common import as_numbers, compare, console, options, python_reference
from torch import Tensor, nn

WIDTH, FILTERS, LENGTH, BATCH, VOCABULARY = 64, 64, 40, 64, 1500
CHAPTERS = ("specialnames", "compound", "types", "formatstrings", "string-methods", "debugger")


class TextCNN(nn.Module):
    """Embedding, convolutions, the largest over time, norm, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.filters = nn.ModuleList(nn.Conv1d(WIDTH, FILTERS, size) for size in (3, 4, 5))
        self.norm = nn.LayerNorm(3 * FILTERS)
        self.head = nn.Linear(3 * FILTERS, len(CHAPTERS))
        self.loss = nn.CrossEntropyLoss()

    def logits(self, passage: Tensor) -> Tensor:
        """``[B, LENGTH]`` to ``[B, chapters]``."""
        x = self.words(passage).mT
        found = [torch.relu(convolution(x)).amax(-1) for convolution in self.filters]
        return self.head(self.norm(torch.cat(found, -1)))

    def forward(self, passage: Tensor, chapter: Tensor) -> Tensor:
        return self.loss(self.logits(passage), chapter)


def main() -> None:
    """Train on the first nine tenths of each chapter, judge by the last."""
    chosen = options(__doc__)
    reference = python_reference()
    words = [re.findall(r"\w+|[^\w\s]", reference[name].lower()) for name in CHAPTERS]
    numbers, _ = as_numbers([word for chapter in words for word in chapter], VOCABULARY)
    chapters = numbers.split([len(chapter) for chapter in words])

    def batch(n: int, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(n)
        labels = torch.randint(len(CHAPTERS), (BATCH,), generator=generator)
        passages = []
        for label in labels.tolist():
            end = len(chapters[label])
            low, high = (end * 9 // 10, end) if held_out else (0, end * 9 // 10)
            start = int(torch.randint(low, high - LENGTH, (), generator=generator))
            passages.append(chapters[label][start : start + LENGTH])
        return torch.stack(passages), labels

    model = compare(
        "Text CNN",
        TextCNN(),
        lambda model, n: model(*batch(n)),
        steps=200,
        falls=5.0,
        quick=chosen.quick,
    )
    with torch.no_grad():
        pairs = [batch(n, held_out=True) for n in range(1 if chosen.quick else 10)]
        right = torch.stack([model.logits(x).argmax(-1).eq(y).float().mean() for x, y in pairs])
    console.print(f"right on passages not trained on: {right.mean():.1%} (chance: 17%)")
    assert chosen.quick or right.mean() > 0.4


if __name__ == "__main__":
    main()
