"""The demo's text and its two models: plain PyTorch, with nothing of fastseq in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class CharGPT(nn.Module):
    """A character-level GPT: pre-norm blocks of causal self-attention and feed-forward.

    Args:
        vocabulary: how many characters there are.
        width: size of the residual stream; the feed-forward is four times as wide.
        depth: how many blocks.
        heads: attention heads per block.
        context: the longest sequence it can read.
    """

    def __init__(self, vocabulary: int, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[batch, length]`` characters to ``[batch, length, vocabulary]`` logits of the next."""
        length = tokens.shape[1]
        x = self.characters(tokens) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        for block in self.blocks:
            x = block(x, mask)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, attn_mask=mask, is_causal=True, need_weights=False)[0]
        y: Tensor = x + self.feed_forward(self.norm2(x))
        return y


class RecurrentLM(nn.Module):
    """A recurrent language model: embedding, stacked GRU, layer norm, linear.

    Args:
        vocabulary: how many characters there are.
        width: size of embedding and hidden state.
        depth: GRU layers.
    """

    def __init__(self, vocabulary: int, width: int, depth: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, width, num_layers=depth, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[batch, length]`` characters to ``[batch, length, vocabulary]`` logits of the next."""
        hidden, _ = self.gru(self.characters(tokens))
        logits: Tensor = self.head(self.norm(hidden))
        return logits


@dataclass(frozen=True)
class Text:
    """The language reference that ships with every Python, as numbers."""

    tokens: Tensor
    alphabet: str

    @classmethod
    def load(cls) -> Text:
        """The topics of ``pydoc_data``, joined in the order of their names."""
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
        alphabet = "".join(sorted(set(text)))
        number = {character: index for index, character in enumerate(alphabet)}
        return cls(torch.tensor([number[character] for character in text]), alphabet)

    def batch(self, size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random stretches of the text and, for each character of them, the one that follows."""
        starts = torch.randint(len(self.tokens) - length - 1, (size, 1), generator=generator)
        places = starts + torch.arange(length)
        return self.tokens[places], self.tokens[places + 1]

    def write(self, tokens: Tensor) -> str:
        """Numbers back to characters."""
        return "".join(self.alphabet[token] for token in tokens.tolist())
