"""token_position_embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import current_backend, note
from ..ops.embedding import TokenPositionEmbeddingFunction, check_keys, forward_op
from ..random import draw_seed
from ..reference import embedding as reference
from ._dispatch import FLOATING, is_foreign, is_transformed, records_gradient

_NAME = "token_position_embedding"


def token_position_embedding(
    ids: Tensor,
    token_table: Tensor,
    position_table: Tensor,
    positions: Tensor | None = None,
    segment_table: Tensor | None = None,
    segments: Tensor | None = None,
    *,
    offset: int = 0,
    scale: float = 1.0,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    r"""What a Transformer begins with: the tokens' rows and their positions', in one pass.

    .. math:: y_l = \mathrm{dropout}(s \cdot E_{ids_l} + P_{p_l} + S_{segments_l})

    Nothing is stored between the lookups and the sum. The gradients of the tables are sums in a
    fixed order, the same to the bit in every run.

    Args:
        ids: int64 or int32, ``[*, L]``.
        token_table: E, ``[V, D]``; fp32, fp64, fp16 or bf16.
        position_table: P, ``[M, D]``.
        positions: p, int64 or int32, ``[L]`` or the shape of ids; by default ``offset``,
            ``offset + 1`` and on.
        segment_table, segments: S, ``[K, D]``, and its rows, as ``positions``; BERT's token types.
            Both or none.
        offset: the first position, without ``positions``: for a decoder, the number of tokens it
            has cached.
        scale: s. The Transformer has :math:`\sqrt{D}`, GPT and BERT 1.
        padding_idx: as in ``torch.nn.functional.embedding``, a row of E without a gradient;
            negative ones count from the end.
        dropout_p: probability of zeroing an element of the sum; the others are scaled by
            ``1 / (1 - dropout_p)``. The mask is a function of a seed drawn from torch's generator
            and the place alone.
        training: without it nothing is dropped.

    Returns:
        ``[*, L, D]`` in the tables' dtype, contiguous; arithmetic is fp32 (fp64 for fp64).

    Raises:
        IndexError: a key lies outside its table. On a GPU, where finding out would wait for it, the
            row becomes NaN instead, and the key reads nothing and adds to nothing.
        RuntimeError: shapes, dtypes or devices do not fit each other.
        ValueError: ``dropout_p`` outside [0, 1], or ``padding_idx`` no row.

    Source: Vaswani et al., "Attention Is All You Need", 2017, section 3.4; Devlin et al., "BERT",
    2019, section 3 (segments).
    """
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{_NAME}: dropout_p must be between 0 and 1, got {dropout_p}")
    dropout_p = dropout_p if training else 0.0
    tables = (token_table, position_table, segment_table)
    keys = (ids, positions, segments)
    _validate(tables, keys, offset)
    if padding_idx is not None:
        rows = token_table.shape[0]
        if not -rows <= padding_idx < rows:
            raise ValueError(
                f"{_NAME}: padding_idx must be in [-{rows}, {rows}), got {padding_idx}"
            )
        padding_idx %= rows
    records = records_gradient(*tables)
    if reason := _torch_takes(tables, keys, records, dropout_p):
        note(_NAME, "torch", reason)
        try:
            return _by_torch(tables, keys, offset, scale, padding_idx, dropout_p)
        except IndexError:
            check_keys(tables, keys)  # raises one that names the argument
            raise
    ids = ids.long()
    positions = None if positions is None else positions.long()
    segments = None if segments is None else segments.long()
    seed = draw_seed(token_table.device) if dropout_p > 0.0 else None
    if is_transformed():
        note(_NAME, "reference", "torch.func or forward-mode AD")
        return reference.token_position_embedding(
            *(*tables, ids, positions, segments, offset, scale, padding_idx, dropout_p, seed)
        )
    if records:
        output: Tensor = TokenPositionEmbeddingFunction.apply(  # type: ignore[no-untyped-call]
            *(*tables, ids, positions, segments, offset, scale, padding_idx, dropout_p, seed)
        )
        return output
    return forward_op(  # type: ignore[no-any-return]
        *(*tables, ids, positions, segments, offset, scale, dropout_p, seed)
    )


_Three = tuple[Tensor, Tensor | None, Tensor | None]


def _torch_takes(
    tables: tuple[Tensor, Tensor, Tensor | None], keys: _Three, records: bool, dropout_p: float
) -> str | None:
    """Why torch's lookups and sums take the call, or None.

    Measured on one core of an AVX-512 EPYC: without dropout ours takes 10 us longer to call, 30
    where autograd records, and is level at 150 and 50 thousand numbers.
    """
    if is_foreign(*tables, *keys):
        return "a tensor subclass, layout or trace that torch must handle"
    if dropout_p > 0.0 or not tables[0].is_cpu or current_backend() != "auto":
        return None
    if torch.compiler.is_compiling():
        return None
    if keys[0].numel() * tables[0].shape[1] < (50_000 if records else 150_000):
        return "so small that the call costs more than the kernel saves"
    return None


def _by_torch(
    tables: tuple[Tensor, Tensor, Tensor | None],
    keys: _Three,
    offset: int,
    scale: float,
    padding_idx: int | None,
    dropout_p: float,
) -> Tensor:
    (token, position, segment), (ids, positions, segments) = tables, keys
    output = F.embedding(ids, token, padding_idx)
    if scale != 1.0:
        output = output * scale
    if positions is None:
        output = output + position[offset : offset + ids.shape[-1]]
    else:
        output = output + F.embedding(positions, position)
    if segment is not None and segments is not None:
        output = output + F.embedding(segments, segment)
    return F.dropout(output, dropout_p) if dropout_p > 0.0 else output


def _validate(tables: tuple[Tensor, Tensor, Tensor | None], keys: _Three, offset: int) -> None:
    token, position, segment = tables
    ids, positions, segments = keys
    if (segment is None) != (segments is None):
        given, missing = (
            ("segments", "segment_table") if segment is None else ("segment_table", "segments")
        )
        raise RuntimeError(f"{_NAME}: {given} needs {missing}")
    if token.dtype not in FLOATING:
        raise RuntimeError(
            f"{_NAME}: token_table must be fp32, fp64, fp16 or bf16, got {token.dtype}"
        )
    size = token.shape[-1] if token.dim() else 0
    for role, table in (("token", token), ("position", position), ("segment", segment)):
        if table is None:
            continue
        if table.dim() != 2 or table.shape[1] != size:
            raise RuntimeError(
                f"{_NAME}: {role}_table must be [rows, {size if role != 'token' else 'D'}], "
                f"got {list(table.shape)}"
            )
        if table.dtype != token.dtype or table.device != token.device:
            raise RuntimeError(
                f"{_NAME}: {role}_table must be {token.dtype} on {token.device} as token_table is, "
                f"got {table.dtype} on {table.device}"
            )
    if ids.dim() < 1:
        raise RuntimeError(f"{_NAME}: ids must be [*, L], got a scalar")
    length = ids.shape[-1]
    for role, key in (("ids", ids), ("positions", positions), ("segments", segments)):
        if key is None:
            continue
        if key.dtype not in (torch.int64, torch.int32):
            raise RuntimeError(f"{_NAME}: {role} must be int64 or int32, got {key.dtype}")
        if key.device != token.device:
            raise RuntimeError(
                f"{_NAME}: {role} must be on token_table's device {token.device}, got {key.device}"
            )
        if key.shape not in ((length,), ids.shape):
            raise RuntimeError(
                f"{_NAME}: {role} must be [{length}] or {list(ids.shape)}, got {list(key.shape)}"
            )
    if positions is None and (offset < 0 or offset + length > position.shape[0]):
        raise IndexError(
            f"{_NAME}: positions {offset} to {offset + length - 1} are not all in a table of "
            f"{position.shape[0]}"
        )
