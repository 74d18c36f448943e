"""Additive attention as a module: the projections and the fused scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import functional


class AdditiveAttention(torch.nn.Module):
    r"""Additive (Bahdanau) attention; see :func:`fastseq.functional.additive_attention`.

    .. math:: y_i = \sum_j \mathrm{softmax}_j\left(u \cdot \tanh(W_q x_i + W_k z_j)\right) v_j

    Args:
        query_size, key_size: the last dimension of queries and keys.
        hidden_size: the dimension both are projected to.
        bias: whether the projection of the queries has a bias (one for both is enough).
        device, dtype: of the parameters.

    Attributes:
        query_proj: ``Linear(query_size, hidden_size)``, :math:`W_q`.
        key_proj: ``Linear(key_size, hidden_size, bias=False)``, :math:`W_k`.
        score_weight: ``Parameter [hidden_size]``, :math:`u`; initialised as a ``Linear`` to one
            feature.

    Shape:
        query ``[B, Lq, query_size]``, key ``[B, Lk, key_size]``, value ``[B, Lk, Dv]`` (default:
        the key), mask broadcast to ``[B, Lq, Lk]`` (True takes part) -> ``[B, Lq, Dv]``; with
        ``need_weights`` also the weights ``[B, Lq, Lk]``, whose memory is their size.

    A decoder that asks the same keys step by step projects them once (``key_proj``) and calls the
    function.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        hidden_size: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query_size, self.key_size, self.hidden_size = query_size, key_size, hidden_size
        self.query_proj = torch.nn.Linear(query_size, hidden_size, bias, device, dtype)
        self.key_proj = torch.nn.Linear(key_size, hidden_size, False, device, dtype)
        self.score_weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.query_proj.reset_parameters()
        self.key_proj.reset_parameters()
        bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size else 0.0
        torch.nn.init.uniform_(self.score_weight, -bound, bound)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        value = key if value is None else value
        if need_weights:
            # The weights are what attention makes of the unit vectors as values.
            unit = torch.eye(key.shape[1], dtype=value.dtype, device=value.device)
            unit = unit.expand(value.shape[0], -1, -1)
            both = functional.additive_attention(
                self.query_proj(query),
                self.key_proj(key),
                torch.cat((value, unit), 2),
                self.score_weight,
                mask,
            )
            output, weights = both.split((value.shape[2], key.shape[1]), 2)
            return output, weights
        return functional.additive_attention(
            self.query_proj(query), self.key_proj(key), value, self.score_weight, mask
        )

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}"
