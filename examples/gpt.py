"""A GPT on characters: trained, then made to write with a cache of keys and values.

Every character looks at itself and those before it, so what has been computed for them stays right
when more are added: in generation each step computes one row, and reads the keys and values of the
others from a cache. Blocks are pre-norm; the logits of the next character are drawn from in one
pass, the most probable few of them.

    python examples/gpt.py
"""

import time

import torch
import torch.nn.functional as F
from _common import as_numbers, compare, console, options, python_reference
from torch import Tensor, nn

import fastseq

WIDTH, HEADS, DEPTH, CONTEXT, BATCH = 96, 4, 3, 96, 24


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``."""

    def __init__(self, attend) -> None:
        super().__init__()
        self.attend = attend
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None, start: int) -> Tensor:
        """``x [B, L, WIDTH]``, positions ``start`` and on; a cache has those before them."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            end = start + x.shape[1]
            for kept, new in zip(cache, (k, v), strict=True):
                kept[:, :, start:end] = new
            k, v = (kept[:, :, :end] for kept in cache)
        # One row sees all that there is; a whole text is masked.
        attended = self.attend(q, k, v, is_causal=x.shape[1] > 1)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm2(x))


class GPT(nn.Module):
    """Tokens and positions, blocks, norm, head."""

    def __init__(self, symbols: int, attend) -> None:
        super().__init__()
        self.embedding = fastseq.nn.TokenPositionEmbedding(symbols, WIDTH, CONTEXT)
        nn.init.normal_(self.embedding.token.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(attend) for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, symbols)
        self.loss = nn.CrossEntropyLoss()

    def logits(self, text: Tensor, caches: list | None = None, start: int = 0) -> Tensor:
        """``[B, L]`` to ``[B, L, symbols]``."""
        x = self.embedding(text, offset=start)
        for block, cache in zip(self.blocks, caches or [None] * DEPTH, strict=True):
            x = block(x, cache, start)
        return self.head(self.norm(x))

    def forward(self, text: Tensor) -> Tensor:
        return self.loss(self.logits(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


@torch.no_grad()
def write(model: GPT, prompt: Tensor, length: int, *, cached: bool) -> tuple[Tensor, float]:
    """The prompt and what follows ``[B, length]``; milliseconds for a character."""
    shape = len(prompt), HEADS, CONTEXT, WIDTH // HEADS
    caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(DEPTH)] if cached else None
    text, generator = prompt, torch.Generator().manual_seed(0)
    begin = time.perf_counter()
    while text.shape[1] < length:
        start = text.shape[1] - 1 if cached and text.shape[1] > prompt.shape[1] else 0
        logits = model.logits(text[:, start:], caches, start)[:, -1]
        new = fastseq.functional.sample(logits, temperature=0.8, top_k=20, generator=generator)
        text = torch.cat((text, new[:, None]), 1)
    return text, 1e3 * (time.perf_counter() - begin) / (length - prompt.shape[1])


def main() -> None:
    """Train, then write with and without the cache: the same text."""
    chosen = options(__doc__)
    text, alphabet = as_numbers(list("\n\n".join(python_reference().values())))

    def step(model: nn.Module, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(n)
        starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
        return model(text[starts + torch.arange(CONTEXT)])

    before = GPT(len(alphabet), F.scaled_dot_product_attention)
    after = GPT(len(alphabet), fastseq.functional.scaled_dot_product_attention)
    model = compare(
        "GPT",
        before,
        step,
        after=fastseq.accelerate(after),
        steps=150,
        falls=1.6,
        quick=chosen.quick,
        learning_rate=2e-3,
    )
    length = 24 if chosen.quick else CONTEXT
    prompts = text[torch.arange(4)[:, None] * 5000 + torch.arange(16)]
    slow, slow_ms = write(model, prompts, length, cached=False)
    fast, fast_ms = write(model, prompts, length, cached=True)
    console.print(f"a character of each of 4: {slow_ms:.2f} ms, with the cache {fast_ms:.2f} ms")
    assert torch.equal(slow, fast)
    console.print("".join(alphabet[n] for n in fast[0]), markup=False)


if __name__ == "__main__":
    main()
