"""TokenPositionEmbedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from .feed_forward import is_watched
from .positional import LearnedPositionalEncoding


class TokenPositionEmbedding(nn.Module):
    r"""What a Transformer begins with; see :func:`fastseq.functional.token_position_embedding`.

    ``dropout(scale * token[ids] + position[positions] + segment[segments])`` in one pass. Parts
    that are no longer what they were built as (sharded, parametrized, with adapters, hooks,
    ``max_norm``) are called one by one instead.

    Args:
        num_embeddings, d_model, padding_idx: as :class:`torch.nn.Embedding`.
        max_len: the most positions.
        dropout: probability of zeroing an element of the sum, in training.
        scale: of the tokens' rows; the Transformer has :math:`\sqrt{d\_model}`, GPT and BERT 1.
        num_segments: kinds of segments, BERT's token types; 0: there are none.

    Attributes:
        token: ``torch.nn.Embedding(num_embeddings, d_model, padding_idx)``.
        position: :class:`LearnedPositionalEncoding`, with the dropout.
        segment: ``torch.nn.Embedding(num_segments, d_model)`` or None.

    Shape:
        ids ``[*, L]``; positions (by default ``offset`` and on) and segments alike or ``[L]``;
        int64 or int32 -> ``[*, L, d_model]``.
    """

    segment: nn.Embedding | None

    def __init__(
        self,
        num_embeddings: int,
        d_model: int,
        max_len: int,
        padding_idx: int | None = None,
        dropout: float = 0.0,
        scale: float = 1.0,
        num_segments: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(num_embeddings, d_model, padding_idx, device=device, dtype=dtype)
        self.position = LearnedPositionalEncoding(
            max_len, d_model, dropout, device=device, dtype=dtype
        )
        self.segment = None
        if num_segments:
            self.segment = nn.Embedding(num_segments, d_model, device=device, dtype=dtype)
        self.scale = scale

    def forward(
        self,
        ids: Tensor,
        offset: int = 0,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        if (segments is None) != (self.segment is None):
            built = "without" if self.segment is None else "with"
            raise RuntimeError(f"TokenPositionEmbedding: it was built {built} num_segments")
        position = self.position
        if not self._as_built():
            output = self.token(ids)
            output = output if self.scale == 1.0 else output * self.scale
            if self.segment is not None:
                output = output + self.segment(segments)
            return position(output, offset, positions)  # type: ignore[no-any-return]
        return functional.token_position_embedding(
            *(ids, self.token.weight, position.weight, positions),
            *(None if self.segment is None else self.segment.weight, segments),
            offset=offset,
            scale=self.scale,
            padding_idx=self.token.padding_idx,
            dropout_p=position.dropout,
            training=position.training,
        )

    def _as_built(self) -> bool:
        """Whether nothing but the parts' weights has a say."""
        if type(self.position) is not LearnedPositionalEncoding or is_watched(self.position):
            return False
        tables = (self.token,) if self.segment is None else (self.token, self.segment)
        return all(
            type(table) is nn.Embedding
            and table.max_norm is None
            and not (table.sparse or table.scale_grad_by_freq or is_watched(table))
            for table in tables
        )

    def extra_repr(self) -> str:
        return f"scale={self.scale}" if self.scale != 1.0 else ""
