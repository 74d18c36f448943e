"""A neural probabilistic language model beside the bigram model it was to beat.

Which word comes next? A bigram model counts which follows which, and knows nothing of two words
being alike. The network of Bengio et al. (2003) gives every word a vector, reads the vectors of the
four words before, and so what it learns of one word helps with all that are like it.

    python examples/neural_language_model.py
"""

import re

import torch
from _common import as_numbers, compare, console, options, python_reference
from torch import Tensor, nn

import fastseq

CONTEXT, VOCABULARY, BATCH = 4, 1500, 256


class NeuralLanguageModel(nn.Module):
    """``softmax(b + U tanh(d + H x))`` of the words' vectors x; Bengio 2003, eq. 1 with W = 0."""

    def __init__(self, width: int = 32, hidden: int = 128) -> None:
        super().__init__()
        self.vectors = nn.Embedding(VOCABULARY, width)
        self.hidden = nn.Linear(CONTEXT * width, hidden)
        self.output = nn.Linear(hidden, VOCABULARY)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, words: Tensor, following: Tensor) -> Tensor:
        """The loss of ``words [N, CONTEXT]`` and the ``following [N]``."""
        x = self.vectors(words).flatten(1)
        return self.loss(self.output(torch.tanh(self.hidden(x))), following)


def bigram_loss(train: Tensor, held_out: Tensor) -> float:
    """Counting, each pair once more than seen a tenth of a time; no gradient is needed."""
    counts = torch.full((VOCABULARY, VOCABULARY), 0.1)
    ones = torch.ones(len(train) - 1)
    counts.index_put_((train[:-1], train[1:]), ones, accumulate=True)
    # The logarithms of the counts serve as logits: softmax divides by their sum.
    loss = fastseq.functional.cross_entropy(counts.log()[held_out[:-1]], held_out[1:])
    expected = nn.functional.cross_entropy(counts.log()[held_out[:-1]], held_out[1:])
    torch.testing.assert_close(loss, expected)
    return loss.item()


def main() -> None:
    """Train on nine tenths of the text; both models are judged by the last tenth."""
    chosen = options(__doc__)
    text = "\n".join(python_reference().values())
    words, _ = as_numbers(re.findall(r"\w+|[^\w\s]", text.lower()), VOCABULARY)
    train, held_out = words.tensor_split([len(words) * 9 // 10])
    train_windows, test_windows = (
        train.unfold(0, CONTEXT + 1, 1),
        held_out.unfold(0, CONTEXT + 1, 1),
    )

    def step(model: nn.Module, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(n)
        rows = train_windows[torch.randint(len(train_windows), (BATCH,), generator=generator)]
        return model(rows[:, :-1], rows[:, -1])

    model = compare(
        "Bengio 2003",
        NeuralLanguageModel(),
        step,
        steps=1200,
        falls=2.2,
        quick=chosen.quick,
        learning_rate=3e-3,
    )
    with torch.no_grad():
        neural = model(test_windows[:, :-1], test_windows[:, -1]).item()
    bigram = bigram_loss(train, held_out)
    console.print(f"on text not seen, nats a word: bigram {bigram:.3f}, neural {neural:.3f}")
    assert chosen.quick or neural < bigram


if __name__ == "__main__":
    main()
