"""A small BERT: trained to fill in blanks, then fine-tuned to tag words and classify passages.

A seventh of the words is hidden, and the encoder restores them from both sides (Devlin et al.
2019). What it learned of the language is then a start for two tasks with labels: which words are
written with a capital (it reads them all without), one label for every word; and which chapter a
passage comes from, from the mean of its words.

    python examples/masked_language_model.py
"""

import re
from functools import partial
from itertools import accumulate

import torch
from _common import as_numbers, compare, console, options, python_reference
from torch import Tensor, nn

import fastseq

WIDTH, LENGTH, BATCH, VOCABULARY = 64, 32, 32, 1500
BLANK = VOCABULARY
CHAPTERS = 8  # the longest


class Bert(nn.Module):
    """Embeddings, encoder, and a head for one task: ``labels`` of a word or of a passage."""

    def __init__(self, labels: int, *, of_passages: bool = False) -> None:
        super().__init__()
        self.embedding = fastseq.nn.TokenPositionEmbedding(VOCABULARY + 1, WIDTH, LENGTH)
        nn.init.normal_(self.embedding.token.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, labels)
        self.loss = nn.CrossEntropyLoss()  # ignores -100: words that need no label
        self.of_passages = of_passages

    def logits(self, text: Tensor) -> Tensor:
        """``[B, LENGTH]`` to ``[B, LENGTH, labels]``, or ``[B, labels]`` of passages."""
        hidden = self.encoder(self.embedding(text))
        return self.head(hidden.mean(1) if self.of_passages else hidden)

    def forward(self, text: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.logits(text).flatten(0, -2), labels.flatten())


def fine_tune_from(model: Bert, labels: int, *, of_passages: bool) -> Bert:
    """The trained embedding and encoder with a new head, on torch's modules."""
    new = Bert(labels, of_passages=of_passages)
    new.embedding.load_state_dict(model.embedding.state_dict())
    new.encoder.load_state_dict(model.encoder.state_dict())
    return new


def main() -> None:
    """Pre-train on some chapters, fine-tune on them with labels, judge by the ends."""
    chosen = options(__doc__)
    longest = sorted(python_reference().values(), key=len, reverse=True)[:CHAPTERS]
    parts = [re.findall(r"\w+|[^\w\s]", part) for part in longest]
    words = [word for part in parts for word in part]
    text, _ = as_numbers([word.lower() for word in words], VOCABULARY)
    capitals = torch.tensor([word != word.lower() for word in words]).long()
    begins = [0, *accumulate(len(part) for part in parts)]

    def places(chapter: int, count: int, seed: int, *, held_out: bool) -> Tensor:
        """``[count, LENGTH]`` in the first nine tenths of the chapter, or in the last."""
        begin, end = begins[chapter : chapter + 2]
        split, generator = end - (end - begin) // 10, torch.Generator().manual_seed(seed)
        low, high = (split, end) if held_out else (begin, split)
        starts = torch.randint(low, high - LENGTH, (count, 1), generator=generator)
        return starts + torch.arange(LENGTH)

    def batch(n: int, *, held_out: bool = False) -> Tensor:
        """Places of passages, as many of each chapter."""
        return torch.cat(
            [places(c, BATCH // CHAPTERS, n, held_out=held_out) for c in range(CHAPTERS)]
        )

    def masked(model: nn.Module, n: int) -> Tensor:
        truth, generator = text[batch(n)], torch.Generator().manual_seed(n)
        kind = torch.rand(truth.shape, generator=generator)
        other = torch.randint(VOCABULARY, truth.shape, generator=generator)
        # Of those it has to restore most are blank, some another word, some as they are.
        seen = torch.where(kind < 0.12, BLANK, torch.where(kind < 0.135, other, truth))
        return model(seen, torch.where(kind < 0.15, truth, -100))

    chapters = torch.arange(CHAPTERS).repeat_interleave(BATCH // CHAPTERS)
    train = partial(compare, quick=chosen.quick, learning_rate=3e-3)
    model = train("Masked words", Bert(VOCABULARY), masked, steps=300, falls=1.5)
    for title, labels, kinds, of_passages in (
        ("Which words have a capital", lambda at: capitals[at], 2, False),
        ("Which chapter", lambda at: chapters, CHAPTERS, True),
    ):
        tuned = train(
            title,
            fine_tune_from(model, kinds, of_passages=of_passages),
            lambda model, n, labels=labels: model(text[at := batch(n)], labels(at)),
            steps=120,
            falls=2.0,
        )
        with torch.no_grad():
            tests = [batch(n, held_out=True) for n in range(1 if chosen.quick else 20)]
            found = torch.cat([tuned.logits(text[at]).argmax(-1).flatten() for at in tests])
        truth = torch.cat([labels(at).flatten() for at in tests])
        wrong, blind = (truth != found).float().mean(), (truth != truth.mode()[0]).float().mean()
        console.print(f"wrong on text not trained on: {wrong:.1%}, always the same: {blind:.1%}\n")
        assert chosen.quick or wrong < 0.8 * blind


if __name__ == "__main__":
    main()
