"""The Transformer's layers and stacks as drop-in modules.

They are torch's subclassed, constructor and parameters included, and made of our parts: attention,
the feed-forward block in one call, and dropout, residual add and layer norm in one pass, in either
order of norms. There is no other path in eval: what torch's computes there without calling its
children (and with other results: rows of padding as 0) is computed as in training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..functional._dispatch import is_foreign
from .attention import MultiheadAttention
from .feed_forward import activation_name, in_one_call, is_watched
from .layer_norm import LayerNorm


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """:class:`torch.nn.TransformerEncoderLayer` of our parts, with torch's parameters.

    Dropout draws its masks by our generator: the same seed drops other elements than torch's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if _is_torchs(src, src_mask, src_key_padding_mask):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks = src_mask, src_key_padding_mask, is_causal
        x = src
        if self.norm_first:
            branch = _attention(self.self_attn, self.norm1(x), None, *masks)
            y, x = _add_norm(branch, x, self.dropout1, self.norm2)
            return _residual(x, _feed_forward(self, y), self.dropout2)
        branch = _attention(self.self_attn, x, None, *masks)
        x, _ = _add_norm(branch, x, self.dropout1, self.norm1)
        return _add_norm(_feed_forward(self, x), x, self.dropout2, self.norm2)[0]


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """:class:`torch.nn.TransformerDecoderLayer` of our parts; see
    :class:`TransformerEncoderLayer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        masks = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        memory_masks = memory_mask, memory_key_padding_mask, memory_is_causal
        if _is_torchs(tgt, memory, *masks[:2], *memory_masks[:2]):
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        x = tgt
        if self.norm_first:
            branch = _attention(self.self_attn, self.norm1(x), None, *masks)
            y, x = _add_norm(branch, x, self.dropout1, self.norm2)
            branch = _attention(self.multihead_attn, y, memory, *memory_masks)
            y, x = _add_norm(branch, x, self.dropout2, self.norm3)
            return _residual(x, _feed_forward(self, y), self.dropout3)
        branch = _attention(self.self_attn, x, None, *masks)
        x, _ = _add_norm(branch, x, self.dropout1, self.norm1)
        branch = _attention(self.multihead_attn, x, memory, *memory_masks)
        x, _ = _add_norm(branch, x, self.dropout2, self.norm2)
        return _add_norm(_feed_forward(self, x), x, self.dropout3, self.norm3)[0]


class TransformerEncoder(nn.TransformerEncoder):
    """:class:`torch.nn.TransformerEncoder` without its conversion to nested tensors in eval: padded
    rows are computed as in training, not 0."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self.layers)  # copies of the layer that was given

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if _is_torchs(src, mask, src_key_padding_mask):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        causal = _is_causal(mask, is_causal)
        output = src
        for layer in self.layers:
            output = layer(
                output,
                src_mask=mask,
                is_causal=causal,
                src_key_padding_mask=src_key_padding_mask,
            )
        return output if self.norm is None else self.norm(output)


class TransformerDecoder(nn.TransformerDecoder):
    """:class:`torch.nn.TransformerDecoder` of our layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self.layers)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        causal = _is_causal(tgt_mask, tgt_is_causal)
        output = tgt
        for layer in self.layers:
            output = layer(
                output,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=causal,
                memory_is_causal=memory_is_causal,
            )
        return output if self.norm is None else self.norm(output)


class Transformer(nn.Transformer):
    """:class:`torch.nn.Transformer` of our encoder and decoder; a custom one stays as it is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # As torch's constructor has them: positions 6 and 7, or by name.
        given = dict(zip(("custom_encoder", "custom_decoder"), args[6:8], strict=False)) | kwargs
        if given.get("custom_encoder") is None:
            _adopt(self.encoder)
        if given.get("custom_decoder") is None:
            _adopt(self.decoder)


_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
}


def _adopt(module: nn.Module) -> None:
    """Make ours of the modules that torch's constructor has put inside."""
    for inner in module.modules():
        if type(inner) in _OURS:
            inner.__class__ = _OURS[type(inner)]


def _is_torchs(*tensors: Tensor | None) -> bool:
    """Whether torch's own forward must take the call: nested tensors, subclasses, TorchScript."""
    return torch.jit.is_scripting() or is_foreign(*tensors)  # type: ignore[attr-defined]


def _is_causal(mask: Tensor | None, is_causal: bool | None) -> bool:
    """Whether attention may take the mask for the causal one and leave it out.

    Torch compares where the caller does not say, which waits for a GPU; so does this on the CPU
    only. It changes the time, not the result.
    """
    if mask is None or is_causal is not None:
        return bool(is_causal)
    if not mask.is_cpu or mask.dim() != 2 or torch.compiler.is_compiling():
        return False
    rows, columns = mask.shape
    if rows != columns:
        return False
    if mask.dtype == torch.bool:
        return bool(torch.equal(mask, torch.ones_like(mask).triu(1)))
    hidden = torch.full_like(mask, -torch.inf).triu(1)
    return not mask.requires_grad and bool(torch.equal(mask, hidden))


def _attention(
    module: nn.MultiheadAttention,
    query: Tensor,
    memory: Tensor | None,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """A layer's attention to itself, or to ``memory``."""
    key = query if memory is None else memory
    output: Tensor = module(
        query,
        key,
        key,
        attn_mask=mask,
        key_padding_mask=padding,
        is_causal=is_causal,
        need_weights=False,
    )[0]
    return output


def _add_norm(
    branch: Tensor, residual: Tensor, dropout: nn.Module, norm: nn.Module
) -> tuple[Tensor, Tensor]:
    """``x = residual + dropout(branch)``; returns ``(norm(x), x)``, in one pass where both modules
    are as the constructor made them."""
    fused = type(norm) in (LayerNorm, nn.LayerNorm) and type(dropout) is nn.Dropout
    if not fused or is_watched(norm) or is_watched(dropout):
        x = _residual(residual, branch, dropout)
        return norm(x), x
    assert isinstance(norm, nn.LayerNorm)
    assert isinstance(dropout, nn.Dropout)
    return functional.add_layer_norm(
        branch.to(residual.dtype),  # under autocast the stream stays as wide as it is
        residual,
        norm.normalized_shape,
        norm.weight,
        norm.bias,
        norm.eps,
        dropout_p=dropout.p,
        training=dropout.training,
    )


def _residual(residual: Tensor, branch: Tensor, dropout: nn.Module) -> Tensor:
    dropped: Tensor = dropout(branch)
    return residual + dropped


def _feed_forward(
    layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, x: Tensor
) -> Tensor:
    """``linear2(dropout(activation(linear1(x))))``."""
    name = activation_name(layer.activation)
    fused = in_one_call(x, layer.linear1, name, layer.dropout, layer.linear2)
    if fused is not None:
        return fused
    hidden = layer.linear1(x)
    if layer.activation is F.relu and type(layer.linear1) is nn.Linear:
        # Where it stands: nobody else has it, and the product before does not save it.
        hidden = torch.relu(hidden) if is_watched(layer.linear1) else torch.relu_(hidden)
    else:
        hidden = layer.activation(hidden)
    output: Tensor = layer.linear2(layer.dropout(hidden))
    return output
