"""The attention calls whose kernels are compiled and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from fastseq.kernels import (
    append_to_cache,
    attention,
    attention_backward,
    attention_decode,
)
from fastseq.ops.attention import Backward, Forward

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTH = 512

#: What is added to plain attention, by name.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"window_right": 0},
    "mask": {"mask": True},
    "bias": {"bias": True},
    "dropout": {"seed": True},
    "window": {"window_left": 256, "window_right": 0},
    "packed": {"packed": True, "window_right": 0},
}
_FULL = [
    *((kind, "bf16", d) for kind in ("plain", "causal") for d in (64, 128)),
    ("causal", "bf16", 256),
    ("causal", "bf16", 80),
    ("causal", "fp32", 64),
    ("mask", "bf16", 128),
    ("bias", "bf16", 64),
    ("dropout", "bf16", 128),
    ("window", "bf16", 64),
    ("packed", "bf16", 128),
]
#: Of these also what tensor descriptors make of them.
_DESCRIBED = [
    ("plain", "bf16", 64),
    ("causal", "bf16", 128),
    ("packed", "bf16", 128),
]
_QUICK = [("plain", "bf16", 64), ("causal", "bf16", 128)]


def _arguments(
    dtype: torch.dtype,
    d: int,
    *,
    mask: bool = False,
    bias: bool = False,
    seed: bool = False,
    packed: bool = False,
    window_left: int = -1,
    window_right: int = -1,
) -> Forward:
    q, k, v = (torch.empty(1, 2, LENGTH, d, dtype=dtype) for _ in range(3))
    plane = (1, 1, LENGTH, LENGTH)
    starts = torch.zeros(4, dtype=torch.int32) if packed else None
    return Forward(
        q,
        k,
        v,
        torch.empty(plane, dtype=dtype) if bias else None,
        torch.empty(plane, dtype=torch.bool) if mask else None,
        None,
        None,
        starts,
        starts,
        None,
        torch.zeros(1, dtype=torch.int64) if seed else None,
        0.125,
        window_left,
        window_right,
        False,
        0.0,
        0.1 if seed else 0.0,
    )


def _forward(dtype: torch.dtype, d: int, **kind: Any) -> None:
    a = _arguments(dtype, d, **kind)
    attention.forward(a, torch.empty_like(a.query), torch.empty(a.query.shape[:3]))


def _backward(dtype: torch.dtype, d: int, **kind: Any) -> None:
    a = _arguments(dtype, d, **kind)
    output, lse = torch.empty_like(a.query), torch.empty(a.query.shape[:3])
    grad_bias = torch.empty(0 if a.bias is None else a.bias.shape)
    backward = Backward(*a, output, None, output, lse, a.bias is not None, None)
    grads = (torch.empty_like(t) for t in (a.query, a.key, a.value))
    attention_backward.backward(backward, *grads, grad_bias)


def _described(call: Callable[[], None]) -> None:
    """With tensor descriptors, where the architecture has them; see FASTSEQ_DESCRIPTORS."""

    def on(launch: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: replace(launch(*arguments), descriptors=True)

    names = (
        (attention, "forward_launch"),
        (attention_backward, "kv_launch"),
        (attention_backward, "q_launch"),
    )
    with ExitStack() as stack:
        for module, name in names:
            stack.enter_context(patch.object(module, name, on(getattr(module, name))))
        call()


def _decode(dtype: torch.dtype, d: int, **bounds: int) -> None:
    a = _arguments(dtype, d, **bounds)
    cache = torch.empty(1, 2, 4096, d, dtype=dtype)
    query = torch.empty(1, 8, 1, d, dtype=dtype)
    a = a._replace(query=query, key=cache, value=cache, bottom_right=True)
    attention_decode.forward(a, torch.empty_like(query), torch.empty(query.shape[:3]))


def _append(dtype: torch.dtype, d: int) -> None:
    cache, new = torch.empty(2, 8, 4096, d, dtype=dtype), torch.empty(2, 8, 1, d, dtype=dtype)
    lengths = torch.zeros(2, dtype=torch.int64)
    append_to_cache.append(cache, cache, new, new, lengths, lengths)


def cases(full: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(label, call) of every kernel by what is added to it, dtype and head_dim."""
    for kind, name, d in _FULL if full else _QUICK:
        for direction, call in (("forward", _forward), ("backward", _backward)):
            label = f"attention {direction} {kind} {name} {d}"
            yield label, partial(call, DTYPES[name], d, **KINDS[kind])
    for kind, name, d in _DESCRIBED if full else _DESCRIBED[:1]:
        for direction, call in (("forward", _forward), ("backward", _backward)):
            label = f"attention {direction} descriptors {kind} {name} {d}"
            plain = partial(call, DTYPES[name], d, **KINDS[kind])
            yield label, partial(_described, plain)
    for name, d in (("bf16", 64), ("bf16", 128), ("fp32", 128)) if full else (("bf16", 128),):
        yield f"attention decode {name} {d}", partial(_decode, DTYPES[name], d)
        window = {"window_left": 1000, "window_right": 0}
        yield f"attention decode window {name} {d}", partial(_decode, DTYPES[name], d, **window)
    yield "attention append bf16 128", partial(_append, torch.bfloat16, 128)


def expects(kernel: str, label: str) -> set[str]:
    """Rows go by 16 bytes, 16-bit products to the tensor cores."""
    if kernel == "attention_delta_kernel":
        return {"wide_loads"}
    if kernel == "attention_merge_kernel":
        return set()
    if kernel in ("attention_bias_kernel", "attention_chunk_kernel"):
        return {"wide_loads"} | ({"tensor_cores"} if "fp32" not in label else set())
    wide = {"wide_loads", "wide_stores"}
    if "descriptors" in label:
        return {"tensor_cores", "wide_stores"}  # and by test_descriptors what must be on Hopper
    if kernel == "append_to_cache_kernel":
        return wide
    return wide if "fp32" in label else {*wide, "tensor_cores"}
