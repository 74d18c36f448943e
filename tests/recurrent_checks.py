"""What the tests of the recurrent family share: pairs of modules, everything they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq import functional, nn


def module_pair(name: str, *sizes: int, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    ours = getattr(nn, name)(*sizes, **options).to(dtype)
    theirs = getattr(torch.nn, name)(*sizes, **options).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def everything(module: Any, input: Any, hx: Any, x: Tensor) -> list[Tensor]:
    """Outputs, final states and all gradients, for fixed gradients of the outputs."""
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    output, final = module(input, hx)
    data = output.data if isinstance(output, PackedSequence) else output
    outputs = [data, *([final] if isinstance(final, Tensor) else final)]
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    inputs = [x, *states, *module.parameters()]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def flat(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [tensor for part in results for tensor in flat(part)]


def sequence_call(kind: str, **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    """A small call of two steps and its inputs, for numerical gradients."""
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[kind] * 3
    shapes = [(2, 2, 2), (1, 2, 3), *([(1, 2, 3)] if kind == "lstm" else [])]
    shapes += [(gates, 2), (gates, 3), (gates,), (gates,)]
    norms = 0
    if options.pop("norm", False):
        extra = [(gates,), (gates,)] + ([(3,), (3,)] if kind == "lstm" else [])
        norms = len(extra)
        shapes += extra
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    states = 2 if kind == "lstm" else 1

    def call(*tensors: Tensor) -> Any:
        torch.manual_seed(5)  # one mask for all evaluations
        hx = tensors[1 : 1 + states]
        params = list(tensors[1 + states : len(tensors) - norms])
        more = {**options, "layer_norm": list(tensors[-norms:])} if norms else options
        made = getattr(functional, kind)(
            tensors[0], hx if states == 2 else hx[0], params, True, 1, 0.0, True, **more
        )
        return tuple(flat(made))

    return call, inputs
