"""What the recurrent functions refuse, and how they say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..reference.recurrent import GATES
from ._dispatch import FLOATING


def check_call(
    name: str,
    kind: str,
    input: Tensor | PackedSequence,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    shape: Any,
    extras: Any,
) -> None:
    """That sizes fit each other and options are in range.

    Raises:
        RuntimeError: sizes do not fit, or there are no steps.
        ValueError: an option is out of range, or cannot be combined with another.
    """
    _check_options(name, kind, input, shape, extras)
    layers = shape.num_layers * shape.directions
    each = len(params) // layers
    if len(params) != layers * each or each not in _each(kind, shape.has_biases):
        counts = " or ".join(str(count * layers) for count in _each(kind, shape.has_biases))
        raise RuntimeError(
            f"{name}: params must be {counts} tensors for {shape.num_layers} layers in "
            f"{shape.directions} directions, got {len(params)}"
        )
    packed = isinstance(input, PackedSequence)
    data: Tensor = input.data if packed else input  # type: ignore[assignment]
    if not packed and data.dim() not in (2, 3):
        raise ValueError(f"{name}: input must have 2 or 3 dimensions, got {data.dim()}")
    size = params[0].shape[1]
    if data.shape[-1] != size:
        raise RuntimeError(
            f"{name}: input must have the {size} features that weight_ih takes, "
            f"got {data.shape[-1]}"
        )
    _check_params(name, kind, params, each, shape)
    if packed:
        batch = int(input.batch_sizes[0])  # type: ignore[union-attr]
        steps = len(input.batch_sizes)  # type: ignore[union-attr]
    elif data.dim() == 2:
        steps, batch = data.shape[0], None
    else:
        steps, batch = data.shape[:2] if not shape.batch_first else data.shape[1::-1]
    if steps == 0:
        raise RuntimeError(f"{name}: input must have at least one step, got {list(data.shape)}")
    hidden, state = params[0].shape[0] // GATES[kind], params[1].shape[1]
    for role, tensor, width in zip(("h_0", "c_0"), states, (state, hidden), strict=False):
        expected = (layers, width) if batch is None else (layers, batch, width)
        if tuple(tensor.shape) != expected:
            raise RuntimeError(
                f"{name}: {role} must have the shape {list(expected)}, got {list(tensor.shape)}"
            )
    if kind == "lstm" and states and len(states) != 2:
        raise RuntimeError(f"{name}: hx must be a pair of h_0 and c_0, got {len(states)} tensors")
    if extras.lengths is not None:
        _check_lengths(name, extras.lengths, batch, steps)
    if extras.layer_norm is not None:
        _check_norms(name, kind, extras.layer_norm, layers, hidden)


def _each(kind: str, has_biases: bool) -> tuple[int, ...]:
    """How many params a layer-direction may have."""
    count = 4 if has_biases else 2
    return (count, count + 1) if kind == "lstm" else (count,)


def _check_options(name: str, kind: str, input: Any, shape: Any, extras: Any) -> None:
    pair = extras.zoneout if isinstance(extras.zoneout, tuple) else (extras.zoneout,)
    if len(pair) > 1 and kind != "lstm":
        raise ValueError(f"{name}: zoneout must be one number, got {extras.zoneout}")
    for option, value in (
        ("dropout", shape.dropout),
        *(("zoneout", part) for part in pair),
        ("recurrent_dropout", extras.recurrent_dropout),
        ("weight_dropout", extras.weight_dropout),
    ):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}: {option} must be between 0 and 1, got {value}")
    if extras.bptt is not None and extras.bptt < 1:
        raise ValueError(f"{name}: bptt must be a number of steps, at least 1, got {extras.bptt}")
    if extras.bptt is not None and shape.bidirectional:
        raise ValueError(f"{name}: bptt cuts a sequence into chunks; bidirectional must be False")
    if extras.grad_clip is not None and not extras.grad_clip > 0:
        raise ValueError(f"{name}: grad_clip must be above 0, got {extras.grad_clip}")
    if isinstance(input, PackedSequence):
        if extras.lengths is not None:
            raise ValueError(f"{name}: lengths are the packed input's own; pass one of the two")
        if extras.return_all_states:
            raise ValueError(f"{name}: return_all_states wants padded input with lengths")


def _check_params(name: str, kind: str, params: Sequence[Tensor], each: int, shape: Any) -> None:
    gates, state = params[0].shape[0], params[1].shape[1]
    hidden = gates // GATES[kind]
    projected = each % 2 == 1
    for n in range(shape.num_layers * shape.directions):
        width = params[0].shape[1] if n < shape.directions else state * shape.directions
        expected: list[tuple[str, tuple[int, ...]]] = [
            ("weight_ih", (gates, width)),
            ("weight_hh", (gates, state)),
        ]
        if shape.has_biases:
            expected += [("bias_ih", (gates,)), ("bias_hh", (gates,))]
        if projected:
            expected += [("weight_hr", (state, hidden))]
        for (role, wanted), tensor in zip(expected, params[n * each :], strict=False):
            if tuple(tensor.shape) != wanted or hidden * GATES[kind] != gates:
                raise RuntimeError(
                    f"{name}: {role} of layer {n // shape.directions} must have the shape "
                    f"{list(wanted)}, got {list(tensor.shape)}"
                )
    if projected and hidden == 0:
        raise RuntimeError(f"{name}: weight_hr wants hidden units to project, got none")
    if not projected and state != hidden:
        raise RuntimeError(
            f"{name}: weight_hh must have the shape {[gates, hidden]}, got {[gates, state]}"
        )


def _check_lengths(name: str, lengths: Tensor, batch: int | None, steps: int) -> None:
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.is_complex():
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{name}: lengths must be a tensor of integers, got {got}")
    if batch is None:
        raise RuntimeError(f"{name}: lengths go with batched input, got unbatched input")
    if tuple(lengths.shape) != (batch,):
        raise RuntimeError(
            f"{name}: lengths must have the shape {[batch]}, got {list(lengths.shape)}"
        )
    # On a GPU this would wait for it; there, what is out of range is cut off.
    known = lengths.is_cpu and not torch.compiler.is_compiling() and type(lengths) is Tensor
    if known and batch and not torch._C._are_functorch_transforms_active():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > steps:
            raise RuntimeError(
                f"{name}: lengths must be between 0 and the {steps} steps of the input, "
                f"got {low} to {high}"
            )


def _check_norms(name: str, kind: str, norms: Sequence[Tensor], layers: int, hidden: int) -> None:
    if kind not in ("lstm", "gru"):
        raise ValueError(f"{name}: layer_norm is for lstm and gru")
    if hidden == 0:
        raise RuntimeError(f"{name}: layer_norm wants hidden units to normalize, got none")
    gates = (GATES[kind] * hidden,)
    wanted = [gates, gates, (hidden,), (hidden,)] if kind == "lstm" else [gates, gates]
    if len(norms) != len(wanted) * layers:
        raise RuntimeError(
            f"{name}: layer_norm must be {len(wanted) * layers} tensors, got {len(norms)}"
        )
    for n, tensor in enumerate(norms):
        if tuple(tensor.shape) != wanted[n % len(wanted)]:
            raise RuntimeError(
                f"{name}: layer_norm[{n}] must have the shape {list(wanted[n % len(wanted)])}, "
                f"got {list(tensor.shape)}"
            )


def check_tensors(name: str, tensors: Sequence[Tensor]) -> None:
    """That all tensors have the device and the dtype of the first, the input.

    Raises:
        RuntimeError: a device differs.
        ValueError: a dtype differs, or is none of fp32, fp64, fp16 and bf16.
    """
    first = tensors[0]
    if first.dtype not in FLOATING:
        raise ValueError(f"{name}: input must be fp32, fp64, fp16 or bf16, got {first.dtype}")
    for tensor in tensors[1:]:
        if tensor.device != first.device:
            raise RuntimeError(
                f"{name}: states and params must be on the input's device {first.device}, "
                f"got {tensor.device}"
            )
        if tensor.dtype != first.dtype:
            raise ValueError(
                f"{name}: states and params must have the input's dtype {first.dtype}, "
                f"got {tensor.dtype}"
            )
