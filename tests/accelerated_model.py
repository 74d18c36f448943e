"""What the tests of accelerate, explain and restore share: a model, and how to ask about it."""

from __future__ import annotations

import torch
from torch import nn

import fastseq


class Model(nn.Module):
    """A bit of everything; `norm` is reached under two names, the head is tied."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.first = nn.LayerNorm(8)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in "ab")
        self.norm = nn.RMSNorm(8)
        self.alias = self.norm
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.first(self.embedding(tokens))
        for layer in self.layers:
            x = self.alias(x + layer(x))
        return self.head(self.norm(x))


TOKENS = torch.arange(12).reshape(3, 4) % 11


def decisions(model):
    return {row.fqn: row.decision for row in fastseq.explain(model).modules}


def reason(model, fqn):
    return next(row.reason for row in fastseq.explain(model).modules if row.fqn == fqn)
