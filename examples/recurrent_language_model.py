"""RNN, GRU and LSTM that write Python's documentation, by truncated backpropagation through time.

A recurrent net reads one character after another into a state, and the state carries what it knows:
from step to step, from one stretch of text to the next, across the whole training. Gradients flow
back 32 steps and no farther, and are clipped. In torch that is a loop over chunks that detaches the
state in between; ``bptt=32`` says it of one call on the whole stretch, with the same gradients.

    python examples/recurrent_language_model.py
"""

import torch
from _common import as_numbers, compare, console, options, python_reference
from torch import Tensor, nn

import fastseq
from fastseq import functional

WIDTH, BATCH, BPTT, CHUNKS = 128, 16, 32, 4
KINDS = {"RNN": functional.rnn, "GRU": functional.gru, "LSTM": functional.lstm}


class CharacterModel(nn.Module):
    """One recurrent layer; ``state`` is what it has read so far."""

    def __init__(self, kind: str, vocabulary: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, WIDTH)
        self.rnn = getattr(nn, kind)(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary)
        self.loss = nn.CrossEntropyLoss()
        self.state: tuple[Tensor, ...] | None = None

    def read(self, x: Tensor) -> Tensor:
        """``[T, B, WIDTH]`` to hidden states of that shape, chunk by chunk."""
        outputs = []
        for chunk in x.split(BPTT):
            state = self.state and tuple(part.detach() for part in self.state)
            output, new = self.rnn(chunk, state if state is None or len(state) > 1 else state[0])
            self.state = new if isinstance(new, tuple) else (new,)
            outputs.append(output)
        return torch.cat(outputs)

    def forward(self, text: Tensor) -> Tensor:
        """The loss of each character of ``text [T + 1, B]`` after those before it."""
        logits = self.head(self.read(self.characters(text[:-1])))
        return self.loss(logits.flatten(0, 1), text[1:].flatten())


class OneCall(CharacterModel):
    """The same, with the whole stretch in one call."""

    def __init__(self, kind: str, vocabulary: int) -> None:
        super().__init__(kind, vocabulary)
        self.recurrence = KINDS[kind]

    def read(self, x: Tensor) -> Tensor:
        state = self.state and tuple(part.detach() for part in self.state)
        if state is not None and len(state) == 1:
            (state,) = state
        weights = list(self.rnn.parameters())
        output, *self.state = self.recurrence(x, state, weights, train=True, bptt=BPTT)
        return output


@torch.no_grad()
def write(model: CharacterModel, alphabet: list[str], length: int) -> str:
    """Go on from a line break, one character at a time."""
    model.state, written = None, ["\n"]
    for _ in range(length):
        last = torch.tensor([[alphabet.index(written[-1])]])
        logits = model.head(model.read(model.characters(last)))
        written.append(alphabet[int(functional.sample(logits[0, 0], temperature=0.7))])
    return "".join(written)


def main() -> None:
    """Each row of the batch reads a part of the text of its own from beginning to end."""
    chosen = options(__doc__)
    text, alphabet = as_numbers(list("\n\n".join(python_reference().values())))
    rows = text[: len(text) // BATCH * BATCH].view(BATCH, -1).T  # [time, batch]
    stretch = BPTT * CHUNKS

    def step(model: nn.Module, n: int) -> Tensor:
        return model(rows[n * stretch : (n + 1) * stretch + 1])

    for kind in KINDS:
        before = CharacterModel(kind, len(alphabet))
        after = fastseq.accelerate(OneCall(kind, len(alphabet)))
        model = compare(
            kind,
            before,
            step,
            after=after,
            steps=60,
            falls=1.7,
            quick=chosen.quick,
            learning_rate=3e-3,
            clip=1.0,
        )
    console.print(write(model, alphabet, 20 if chosen.quick else 300), markup=False)


if __name__ == "__main__":
    main()
