"""FeedForward, and what makes one call of a layer's two products and what stands between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..backends import current_backend, note
from ..reference.feed_forward import ACTIVATIONS


class FeedForward(nn.Module):
    """The position-wise feed-forward block; see :func:`fastseq.functional.feed_forward`.

    Args:
        d_model: features of input and output.
        dim_feedforward: F, the size between the products.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or ``"swiglu"``.
        dropout: probability of zeroing an element of the activation, in training.
        bias: whether the products have one.

    Attributes:
        linear1, linear2: ``torch.nn.Linear``, named as in torch's Transformer layers; for SwiGLU
            the first has twice as many rows, the gate's before the others.

    Shape:
        ``[*, d_model]`` -> ``[*, d_model]``.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        activation: str = "relu",
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"FeedForward: activation must be one of {', '.join(ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        rows = 2 * dim_feedforward if activation == "swiglu" else dim_feedforward
        self.linear1 = nn.Linear(d_model, rows, bias, device=device, dtype=dtype)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias, device=device, dtype=dtype)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: Tensor) -> Tensor:
        output = in_one_call(input, self.linear1, self.activation, self.dropout, self.linear2)
        if output is None:
            hidden = _ACTIVATIONS[self.activation](self.linear1(input))
            output = self.linear2(self.dropout(hidden))
        return output

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def in_one_call(
    input: Tensor,
    linear1: nn.Module,
    activation: str | None,
    dropout: nn.Module,
    linear2: nn.Module,
) -> Tensor | None:
    """``linear2(dropout(activation(linear1(input))))`` in one call of ours.

    None where a module is another than torch's (quantized, with adapters, parametrized, sharded) or
    somebody watches it, where we have no such activation, and where it is so small that one call
    takes as long as four: then each is to be called.
    """
    if activation is None or type(linear1) is not nn.Linear:
        return None
    if _is_tiny(input, linear1, dropout):
        note("feed_forward", "torch", "so small that the call costs more than the kernel saves")
        return None
    if type(dropout) is not nn.Dropout or type(linear2) is not nn.Linear:
        return None
    if is_watched(linear1) or is_watched(dropout) or is_watched(linear2):
        return None
    return functional.feed_forward(
        input,
        linear1.weight,
        linear1.bias,
        linear2.weight,
        linear2.bias,
        activation=activation,
        dropout_p=dropout.p,
        training=dropout.training,
    )


def _is_tiny(input: Tensor, linear1: nn.Linear, dropout: nn.Module) -> bool:
    """Measured on one core: in training with dropout it is level at 16 thousand wide elements.

    Without, it would be torch's up to far more (see the function), and asking costs some us.
    """
    if not input.is_cpu or current_backend() != "auto" or torch.compiler.is_compiling():
        return False
    limit = 16_000 if dropout.training else 100_000
    return input.numel() // max(1, linear1.in_features) * linear1.out_features < limit


def activation_name(activation: Any) -> str | None:
    """Our name of torch's function or module, None for any other."""
    if type(activation) is nn.GELU and not is_watched(activation):
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if type(activation) in _MODULES and not is_watched(activation):
        return _MODULES[type(activation)]
    return next((name for function, name in _FUNCTIONS if activation is function), None)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody wants the module itself to be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda hidden: F.gelu(hidden, approximate="tanh"),
    "silu": F.silu,
    "swiglu": _swiglu,
}
_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu"}
#: By identity: what is called may have no hash.
_FUNCTIONS = ((F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))
