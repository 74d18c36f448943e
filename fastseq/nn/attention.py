"""MultiheadAttention as a drop-in module."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..backends import note
from ..functional._dispatch import is_foreign


class MultiheadAttention(torch.nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` with torch's whole semantics and parameters.

    What differs: a query whose keys are all masked out attends to nothing and gives 0 (the output
    projection's bias) with a zero gradient in every mode, where torch gives NaN in some; and there
    is no other path in eval. Queries, keys and values go to the kernel as the projections leave
    them, without copies; boolean masks stay boolean. Without ``need_weights`` dropout may draw its
    mask by our generator: the same seed drops other weights than torch's.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if torch.jit.is_scripting() or is_foreign(  # type: ignore[attr-defined]
            query, key, value, self.out_proj.weight, key_padding_mask, attn_mask
        ):
            note("multihead_attention", "torch", "a nested tensor, subclass, layout or trace")
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        batched = _is_batched(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        batch_dim = 0 if self.batch_first or not batched else 1
        if not batched:
            shared = key is query, value is key
            query = query[None]
            key = query if shared[0] else key[None]
            value = key if shared[1] else value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        self._check_sizes(query, key, value)
        batch, queries = query.shape[batch_dim], query.shape[1 - batch_dim]
        keys = key.shape[1 - batch_dim]
        mask, is_causal = self._merged_mask(
            batch, queries, keys, query.dtype, key_padding_mask, attn_mask, is_causal, need_weights
        )
        q, k, v = self._projected(query, key, value)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat((x, bias.expand(*self._one_key(batch, batch_dim), -1)), 1 - batch_dim)
                for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            zeros = k.new_zeros(*self._one_key(batch, batch_dim), k.shape[-1])
            k, v = (torch.cat((x, zeros), 1 - batch_dim) for x in (k, v))
        q, k, v = (self._by_heads(x, batch_dim) for x in (q, k, v))
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            output, weights = _attend_with_weights(q, k, v, mask, dropout_p)
            if average_attn_weights:
                weights = weights.mean(1)
            weights = weights if batched else weights.squeeze(0)
        else:
            output = _attend(q, k, v, mask, dropout_p, is_causal)
        output = output.transpose(1, 2) if batch_dim == 0 else output.permute(2, 0, 1, 3)
        output = F.linear(output.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        return output if batched else output.squeeze(0), weights

    def _check_sizes(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Torch's assertions."""
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(
                f"MultiheadAttention: query must have embed_dim {self.embed_dim} as its last "
                f"dimension, got {query.shape[-1]}"
            )
        same = self._qkv_same_embed_dim
        if (key.shape if same else key.shape[:2]) != (value.shape if same else value.shape[:2]):
            raise AssertionError(
                f"MultiheadAttention: value must fit the key {list(key.shape)}, "
                f"got {list(value.shape)}"
            )

    def _one_key(self, batch: int, batch_dim: int) -> tuple[int, int]:
        return (batch, 1) if batch_dim == 0 else (1, batch)

    def _by_heads(self, x: Tensor, batch_dim: int) -> Tensor:
        """``[batch, heads, length, head_dim]``, a view."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if batch_dim == 0 else x.permute(1, 2, 0, 3)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values; by one product where they are of one tensor."""
        size = self.embed_dim
        if not self._qkv_same_embed_dim:
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            inputs = (query, key, value)
            return tuple(
                F.linear(x, w, b) for x, w, b in zip(inputs, matrices, biases, strict=True)
            )
        weight, bias = cast(Tensor, self.in_proj_weight), self.in_proj_bias
        if key is value:
            if query is key:
                return F.linear(query, weight, bias).chunk(3, -1)
            parts = (slice(0, size), slice(size, 3 * size))
            q, both = (
                F.linear(x, weight[part], None if bias is None else bias[part])
                for x, part in zip((query, key), parts, strict=True)
            )
            return q, *both.chunk(2, -1)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        return tuple(
            F.linear(x, w, b) for x, w, b in zip(inputs, weight.chunk(3), biases, strict=True)
        )

    def _merged_mask(
        self,
        batch: int,
        queries: int,
        keys: int,
        dtype: torch.dtype,
        padding: Tensor | None,
        mask: Tensor | None,
        is_causal: bool,
        need_weights: bool,
    ) -> tuple[Tensor | None, bool]:
        """Both masks as one that broadcasts to ``[batch, heads, queries, keys]``, over the keys the
        module adds too: boolean (True takes part) if both are, else to be added; and whether the
        kernel is to take the causal one itself."""
        if is_causal and mask is None:
            raise RuntimeError(
                "MultiheadAttention: is_causal is a hint about attn_mask, which must be given too"
            )
        padding = _checked(padding, "key_padding_mask", mask, "attn_mask", dtype)
        if is_causal and padding is None and not need_weights:
            return None, True
        mask = _checked(mask, "attn_mask", None, "", dtype)
        if mask is not None:
            expected = {2: (queries, keys), 3: (batch * self.num_heads, queries, keys)}[mask.dim()]
            if mask.shape != expected:
                raise RuntimeError(
                    f"MultiheadAttention: attn_mask must be {list(expected)}, "
                    f"got {list(mask.shape)}"
                )
            mask = mask.view(-1, self.num_heads if mask.dim() == 3 else 1, queries, keys)
        if padding is not None:
            if padding.shape != (batch, keys):
                raise AssertionError(
                    f"MultiheadAttention: key_padding_mask must be {[batch, keys]}, "
                    f"got {list(padding.shape)}"
                )
            padding = padding[:, None, None]
        if mask is None or padding is None:
            merged = padding if mask is None else mask
        elif mask.dtype == torch.bool and padding.dtype == torch.bool:
            merged = mask & padding
        else:
            merged = _added(mask, dtype) + _added(padding, dtype)
        added = (self.bias_k is not None) + self.add_zero_attn
        if merged is not None and added:
            merged = F.pad(merged, (0, added), value=merged.dtype == torch.bool)
        return merged, False


def _is_batched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    num_heads: int,
) -> bool:
    """Whether there is a batch dimension, after torch's own checks of the numbers of dimensions."""
    check = F._mha_shape_check  # type: ignore[attr-defined]
    return bool(check(query, key, value, key_padding_mask, attn_mask, num_heads))


def _checked(
    mask: Tensor | None, name: str, other: Tensor | None, other_name: str, dtype: torch.dtype
) -> Tensor | None:
    """Torch's mask (True is masked out) as ours (True takes part); a floating one as it is."""
    if mask is None:
        return None
    other_type = None if other is None else other.dtype
    if mask.dtype != torch.bool or other_type not in (None, torch.bool):
        # For its errors and its warning of masks of two kinds.
        F._canonical_mask(mask, name, other_type, other_name, dtype, bool(other_name))
    return ~mask if mask.dtype == torch.bool else mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, causal: bool
) -> Tensor:
    """Attention of ``[batch, heads, length, head_dim]``."""
    return functional.scaled_dot_product_attention(query, key, value, mask, dropout_p, causal)


def _attend_with_weights(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """The same, and the weights ``[batch, heads, queries, keys]``, after dropout as torch's."""
    scale = 1.0 / math.sqrt(query.shape[-1])
    if mask is None:
        weights = functional.softmax((query * scale) @ key.mT, -1)
    else:
        weights = functional.masked_softmax(query @ key.mT, mask, scale=scale)
    weights = F.dropout(weights, dropout_p) if dropout_p else weights
    return weights.to(value.dtype) @ value, weights
