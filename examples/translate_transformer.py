"""The Transformer of "Attention Is All You Need" on the task of the recurrent translator.

No state is carried: every word looks at every other (encoder), at those before it (decoder), and
from the decoder at the source (cross-attention), all words at once. Order comes from the positions
alone, sines and cosines that are added. It is ``nn.Transformer`` as it is; padding and the causal
mask are given as always. fastseq's attention, its Add & Norm in one pass and its loss take over.

    python examples/translate_transformer.py
"""

import torch
from _common import BEGIN, PAD, MadeUpLanguage, compare, console, options
from torch import Tensor, nn

import fastseq

WIDTH, BATCH = 64, 64


class Translator(nn.Module):
    """Embeddings, positions, ``nn.Transformer`` and a head."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.source, self.target = (nn.Embedding(words, WIDTH, PAD) for _ in range(2))
        self.positions = fastseq.nn.SinusoidalPositionalEncoding(WIDTH, max_len=64)
        self.transformer = nn.Transformer(
            WIDTH, 4, 2, 2, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(WIDTH, words)
        self.loss = nn.CrossEntropyLoss(ignore_index=PAD)

    def logits(self, source: Tensor, target: Tensor) -> Tensor:
        """Of the word behind each of ``target [B, T]``: ``[B, T, words]``."""
        length, missing = target.shape[1], source == PAD
        hidden = self.transformer(
            self.positions(self.source(source)),
            self.positions(self.target(target)),
            tgt_mask=torch.ones(length, length, dtype=torch.bool).triu(1),  # True: hidden
            tgt_is_causal=True,
            src_key_padding_mask=missing,
            memory_key_padding_mask=missing,
        )
        return self.head(hidden)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """The loss of each word after those before it; padding of the target is ignored there."""
        logits = self.logits(source, target[:, :-1])
        return self.loss(logits.flatten(0, 1), target[:, 1:].flatten())

    @torch.no_grad()
    def translate(self, source: Tensor, length: int) -> Tensor:
        """``[B, length]``: always the most probable word."""
        words = torch.full((len(source), 1), BEGIN)
        for _ in range(length):
            words = torch.cat((words, self.logits(source, words)[:, -1:].argmax(-1)), 1)
        return words[:, 1:]


def main() -> None:
    """Train on sentences made as they are needed; then translate some that were not seen."""
    chosen = options(__doc__)
    language = MadeUpLanguage()
    model = compare(
        "Transformer",
        Translator(len(language.words)),
        lambda model, n: model(*language.batch(BATCH, n)),
        steps=300,
        falls=10.0,
        quick=chosen.quick,
        learning_rate=2e-3,
    )
    right = language.share_right(model.eval().translate, 50 if chosen.quick else 500)
    console.print(f"of sentences not seen, translated without a fault: {right:.0%}")
    assert chosen.quick or right > 0.8
    source, target = language.batch(1, -2)
    made = model.translate(source, target.shape[1] - 1)
    for sentence, foreign in ((source, False), (made, True)):
        console.print(" ".join(language.write(sentence[0], foreign=foreign)))


if __name__ == "__main__":
    main()
