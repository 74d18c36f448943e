"""LayerNorm and RMSNorm as drop-in modules, and their AddNorm forms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional


class LayerNorm(torch.nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` on our kernels; see :func:`fastseq.functional.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` on our kernels; see :func:`fastseq.functional.rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class AddLayerNorm(torch.nn.LayerNorm):
    """Dropout, residual add and layer norm in one pass: the "Add & Norm" of a Transformer.

    Parameters and ``state_dict`` are those of :class:`torch.nn.LayerNorm`.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as
            :class:`torch.nn.LayerNorm`.
        dropout: probability of zeroing an element of the input before the add, in training only.
        residual_in_fp32: keep the residual stream in fp32.

    Shape:
        ``(input, residual) -> (output, new_residual)``, all ``[*, *normalized_shape]``; see
        :func:`fastseq.functional.add_layer_norm`.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout: float = 0.0,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout = dropout
        self.residual_in_fp32 = residual_in_fp32

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        return functional.add_layer_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            dropout_p=self.dropout,
            training=self.training,
            residual_in_fp32=self.residual_in_fp32,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


class AddRMSNorm(torch.nn.RMSNorm):
    """Dropout, residual add and RMS norm in one pass; see :class:`AddLayerNorm`.

    Parameters and ``state_dict`` are those of :class:`torch.nn.RMSNorm`.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dropout: float = 0.0,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.dropout = dropout
        self.residual_in_fp32 = residual_in_fp32

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        return functional.add_rms_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.eps,
            dropout_p=self.dropout,
            training=self.training,
            residual_in_fp32=self.residual_in_fp32,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"
