"""Translation by two LSTMs and additive attention, with a picture of what looks where.

The encoder reads the sentence in both directions. The decoder starts from its last state (Sutskever
et al. 2014) and, for each word it writes, looks back at all it has read: a small network scores
each word of the source, ``u . tanh(W h + V z)``, and the context is their average by these scores
(Bahdanau et al. 2015). Here attention follows the recurrence, so that both take whole sentences at
once. Torch's operations make a tensor ``[batch, target, source, hidden]`` of it, fastseq does not.

    python examples/translate_recurrent.py
"""

from pathlib import Path

import torch
from _common import BEGIN, END, PAD, MadeUpLanguage, compare, console, options, pyplot
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq

WIDTH, BATCH = 128, 64


class Unfused(fastseq.nn.AdditiveAttention):
    """The same parameters, and torch's operations."""

    def forward(self, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.tanh(self.query_proj(query)[:, :, None] + self.key_proj(key)[:, None])
        scores = (hidden @ self.score_weight).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1) @ key


class Translator(nn.Module):
    """Encoder, decoder, and the attention that joins them."""

    def __init__(self, words: int, attention: type[nn.Module]) -> None:
        super().__init__()
        self.source, self.target = (nn.Embedding(words, WIDTH, PAD) for _ in range(2))
        self.encoder = nn.LSTM(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.attention = attention(WIDTH, WIDTH, WIDTH)
        self.combine = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, words)
        self.loss = nn.CrossEntropyLoss(ignore_index=PAD)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """What each word is in its sentence, which words there are, and the decoder's state."""
        there = source != PAD
        lengths = there.sum(1)
        packed = pack_padded_sequence(self.source(source), lengths, True, enforce_sorted=False)
        output, (h, c) = self.encoder(packed)
        memory, _ = pad_packed_sequence(output, True, total_length=source.shape[1])
        return memory, there[:, None], tuple(torch.cat((s[0], s[1]), -1)[None] for s in (h, c))

    def decode(self, words: Tensor, memory: Tensor, there: Tensor, state: tuple[Tensor, ...]):
        """The logits of the next words, and the state behind them."""
        hidden, state = self.decoder(self.target(words), state)
        context = self.attention(hidden, memory, mask=there)
        return self.head(torch.tanh(self.combine(torch.cat((hidden, context), -1)))), state

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        logits, _ = self.decode(target[:, :-1], *self.encode(source))
        return self.loss(logits.flatten(0, 1), target[:, 1:].flatten())

    @torch.no_grad()
    def translate(self, source: Tensor, length: int) -> Tensor:
        """``[B, length]``: always the most probable word."""
        memory, there, state = self.encode(source)
        words = [torch.full((len(source), 1), BEGIN)]
        for _ in range(length):
            logits, state = self.decode(words[-1], memory, there, state)
            words.append(logits.argmax(-1))
        return torch.cat(words[1:], 1)


@torch.no_grad()
def draw(model: Translator, language: MadeUpLanguage, path: Path) -> None:
    """The weights of every word of the source for every word of the translation."""
    source, _ = language.batch(20, -2)
    source = source[(source != PAD).sum(1).argmax()][None]  # the longest
    target = model.translate(source, source.shape[1])[0]
    target = target[(target == END).cumsum(0) == 0]
    memory, there, state = model.encode(source)
    hidden, _ = model.decoder(model.target(torch.cat((torch.tensor([BEGIN]), target)))[None], state)
    _, weights = model.attention(hidden, memory, mask=there, need_weights=True)
    figure, axes = pyplot().subplots(figsize=(7, 7))
    axes.imshow(weights[0], cmap="gray", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(source.shape[1]), [language.words[n] for n in source[0]], rotation=90)
    axes.set_yticks(range(len(target) + 1), [*language.write(target, foreign=True), ">"])
    figure.savefig(path, bbox_inches="tight")
    console.print(f"what each word was written from: {path}")


def main() -> None:
    """Train on sentences made as they are needed; then translate some that were not seen."""
    chosen = options(__doc__)
    language = MadeUpLanguage()
    before, after = (
        Translator(len(language.words), kind) for kind in (Unfused, fastseq.nn.AdditiveAttention)
    )
    model = compare(
        "Encoder, decoder, attention",
        before,
        lambda model, n: model(*language.batch(BATCH, n)),
        after=fastseq.accelerate(after),
        steps=250,
        falls=10.0,
        quick=chosen.quick,
        learning_rate=3e-3,
        clip=1.0,
    )
    right = language.share_right(model.translate, 500)
    console.print(f"of sentences not seen, translated without a fault: {right:.0%}")
    assert chosen.quick or right > 0.8
    draw(model, language, chosen.out / "attention.png")


if __name__ == "__main__":
    main()
