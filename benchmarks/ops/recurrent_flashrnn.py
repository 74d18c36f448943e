"""FlashRNN's LSTM, GRU and Elman network as rivals of ours, where ``flashrnn`` is installed.

Its kernels have the recurrence alone, so the input's product comes before it, and its weights lie
as ``[gates, heads, out, in]``: torch's with one head. It compiles itself by nvcc for every size,
which takes minutes, and needs a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.backends import BackendError

from ..registry import Provider

_FUNCTIONS = {"lstm": "lstm", "gru": "gru", "tanh": "elman"}
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def rivals(backend: str = "cuda_fused") -> tuple[Provider, ...]:
    """The provider ``flashrnn``, or nobody.

    Args:
        backend: FlashRNN's own name for what runs it; ``vanilla`` runs anywhere.
    """
    try:
        from flashrnn import flashrnn
    except ImportError:
        return ()

    def run(**given: Any) -> dict[str, Tensor]:
        return _run(flashrnn, backend, **given)

    return (Provider("flashrnn", run),)


def _run(
    flashrnn: Any, backend: str, *, kind: str, input: Tensor, **rest: Any
) -> dict[str, Tensor]:
    _check(kind, input, rest)
    batch, steps, _ = input.shape
    weight_ih, weight_hh = rest["weight_ih_0"], rest["weight_hh_0"]
    hidden = weight_hh.shape[1]

    def by_gates(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, 1, hidden))

    # [batch, steps, gates, heads, hidden], [gates, heads, hidden, hidden], [gates, heads, hidden]
    products = F.linear(input, weight_ih).unflatten(2, (-1, 1, hidden))
    weights = by_gates(weight_hh)
    zeros = weight_hh.new_zeros(weight_hh.shape[0])
    of_input, of_state = (
        by_gates(zeros if rest.get(name) is None else rest[name])
        for name in ("bias_ih_0", "bias_hh_0")
    )
    if kind == "gru":
        # The candidate's product with the state comes first, apart from that with the input.
        weights = weights.roll(1, 0)
        gates = of_input[:2] + of_state[:2]
        biases = torch.cat([of_state[2:], gates, of_input[2:]])
    else:
        biases = of_input + of_state
    names = ("h_0", "c_0") if kind == "lstm" else ("h_0",)
    missing = input.new_zeros(batch, 1, hidden)
    # [states, batch, 1, heads, hidden]
    initial = torch.stack(
        [missing if rest.get(name) is None else rest[name] for name in names]
    ).unsqueeze(3)
    states, last = flashrnn(
        products,
        weights,
        biases,
        states=initial,
        function=_FUNCTIONS[kind],
        backend=backend,
        dtype=_DTYPES[input.dtype],
    )
    found = {"output": states[0].reshape(batch, steps, hidden)}
    for name, state in zip(("h_n", "c_n"), last, strict=False):
        found[name] = state.reshape(batch, 1, hidden)
    return found


def _check(kind: str, input: Tensor, rest: dict[str, Any]) -> None:
    reason = None
    if kind not in _FUNCTIONS or input.dtype not in _DTYPES:
        reason = "LSTM, GRU and tanh in bf16, fp16 and fp32"
    elif rest["layers"] > 1 or rest["bidirectional"]:
        reason = "one layer in one direction"
    elif rest.get("lengths") is not None or any(
        name.startswith(("ln", "weight_hr")) for name in rest
    ):
        reason = "no lengths, layer norm or projection"
    if reason is not None:
        raise BackendError(f"flashrnn: cannot serve: {reason}")
