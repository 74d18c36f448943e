"""How the attention kernels are launched: tile shapes, and the arguments they have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import _allocation

from .common import (
    INTERPRETED,
    RowStrides,
    ceil_div,
    device_of,
    next_power_of_2,
    shared_memory_limit,
    vector_width,
)

#: lse in base 2 and delta of every query.
Statistics = tuple[Tensor, Tensor]

# --- launch configurations -----------------------------------------------------------------------

#: Whether tiles are brought by the copy engine (TMA), where the architecture has one and it takes
#: the rows (:func:`describable`). Not by default: no clock has seen it, only its code, which is the
#: shorter (docs/attention-kernels.md has the figures).
DESCRIPTORS = os.environ.get("FASTSEQ_DESCRIPTORS") == "1"


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut up: a tile of queries by keys, and who works on it.

    It depends on head_dim, dtype and architecture alone, so a row's result does not depend on the
    batch it comes in. The figures are from the generated code (``tests/codegen``) and what others
    have measured on H100 with the same compiler, not yet from a clock. ``descriptors``: tiles come
    through tensor descriptors, to the same bits; ``FASTSEQ_DESCRIPTORS=1`` sets it for a process.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = DESCRIPTORS

    @property
    def options(self) -> dict[str, int]:
        """As Triton takes them."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def fitted(launch: Launch, resident: int, staged: int, architecture: int) -> Launch:
    """With as many stages as shared memory has room for, one at least.

    Args:
        resident: bytes a program keeps all the time.
        staged: bytes of a stage.
    """
    room = shared_memory_limit(architecture) - 2048 - resident  # 2 KB: reductions, barriers
    return replace(launch, num_stages=max(1, min(launch.num_stages, room // max(staged, 1))))


def careful_launch(width: int) -> Launch:
    """The tile of a careful run, which is never in a hurry and holds every sum twice."""
    if INTERPRETED:
        return Launch(32, 16, 4, 1)
    return Launch(64 if width <= 64 else 32, 16, 8, 1)


# --- arguments -----------------------------------------------------------------------------------


def strides_of(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """The first strides, 0 along dimensions of size 1; zeros for what is not there."""
    if tensor is None:
        return (0,) * count
    pairs = zip(tensor.shape[:count], tensor.stride()[:count], strict=True)
    return tuple(stride if size > 1 else 0 for size, stride in pairs)


def row_vector(width: int, *tensors: Tensor) -> int:
    """Consecutive elements that every access to rows of these tensors may take together."""
    strides = [
        RowStrides(None, None, stride) for tensor in tensors for stride in strides_of(tensor, 3)
    ]
    return vector_width(width, strides, *tensors)


def describable(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can have rows of these: what they are made of, addresses and
    strides, must be multiples of 16 bytes, and the architecture Hopper or later."""
    if device_of(tensors[0]).architecture < 90:
        return False
    return all(
        tensor.data_ptr() % 16 == 0
        and tensor.shape[2] > 1
        and tensor.stride(2) > 0
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
        for tensor in tensors
    )


@contextmanager
def descriptor_memory(tensor: Tensor) -> Iterator[None]:
    """Inside, Triton finds the memory of a launch's descriptors, 128 bytes each for every program.

    The caller's allocator is Triton's again behind it. Like all of Triton's it is the thread's own,
    and autograd runs backward on other threads: so it is set for each launch.
    """
    previous = _allocation._allocator.get()

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=tensor.device)

    triton.set_allocator(allocate)
    try:
        yield
    finally:
        triton.set_allocator(previous)


def block_of(width: int) -> int:
    """The tile's width for rows of that many elements: products want 16 at least."""
    return max(16, next_power_of_2(max(width, 1)))


def uses_tf32(tensor: Tensor) -> bool:
    """Whether fp32 products may be TF32, as torch's own are asked to be."""
    # Not allow_tf32: it raises once somebody has set fp32_precision.
    return tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def tile_count(a: Any, block: int, length: int, starts: Tensor | None) -> tuple[int, int, int]:
    """``(sequences, tiles, BLOCK_B)`` of a grid over lengths: of each, or packed, of all."""
    if starts is None:
        return a.query.shape[0], ceil_div(length, block), 1
    sequences = len(starts) - 1
    # As many as there can be: each sequence has one that is not full.
    return sequences, ceil_div(length, block) + sequences, next_power_of_2(max(sequences, 1))


def terms_of(a: Any) -> dict[str, Any]:
    """The kernels' flags, of the op's arguments."""
    added = a.softcap or a.bias is not None or a.alibi_slopes is not None
    return {
        "SIMPLE": not added and a.scale > 0,
        "SOFTCAP": bool(a.softcap),
        "LEFT": a.window_left >= 0,
        "RIGHT": a.window_right >= 0,
        "BOTTOM_RIGHT": a.bottom_right,
        "PLANE": plane_vector(a),
        "TF32": uses_tf32(a.query),
    }


def dropout_of(a: Any) -> tuple[int, float]:
    """Threshold and factor. The threshold is an int32's bits, so that its type is always one."""
    if a.seed is None:
        return 0, 1.0
    threshold = min(round(a.dropout_p * 2**32), 0xFFFFFFFF)
    threshold -= (threshold >> 31) << 32
    return threshold, 0.0 if a.dropout_p >= 1.0 else 1.0 / (1.0 - a.dropout_p)


def hides(a: Any) -> bool:
    """Whether there may be keys within reach of a program that a query of it does not see."""
    return a.window_left >= 0 or a.window_right >= 0 or has_planes(a)


def has_planes(a: Any) -> bool:
    """Whether tiles of a bias or a mask are loaded."""
    return a.bias is not None or a.mask is not None


def plane_vector(a: Any) -> int:
    """Columns of bias and mask that every access may take together; 0: they are not contiguous."""
    planes = [plane for plane in (a.bias, a.mask) if plane is not None]
    keys = a.key.shape[2]
    if any(plane.shape[3] != keys or plane.stride(3) != 1 for plane in planes):
        return 0
    if a.key_lengths is not None:  # a sequence may end within a vector
        return 1
    strides = [RowStrides(None, None, s) for plane in planes for s in strides_of(plane, 3)]
    return vector_width(keys, strides, *planes)


def bounded(window: int) -> int:
    """A window's bound that can be added to positions without overflow."""
    return min(window, 2**30)


def scalars_of(a: Any) -> tuple[Any, ...]:
    """Numbers that every kernel takes last."""
    bounds = (bounded(a.window_left), bounded(a.window_right))
    return (a.scale, a.softcap, *bounds, *dropout_of(a))


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as the bytes it is."""
    return None if mask is None else mask.view(torch.uint8)


def planes_of(a: Any) -> tuple[Any, ...]:
    """What is added to scores, as every kernel takes it after its tensors."""
    return (a.bias, mask_bytes(a.mask), a.alibi_slopes)


def plane_strides_of(a: Any) -> tuple[int, ...]:
    """The strides of those, likewise."""
    return (*strides_of(a.bias, 4), *strides_of(a.mask, 4), *strides_of(a.alibi_slopes, 1))


def tile_kernel(
    kernel: Any,
    a: Any,
    tensors: tuple[Tensor | None, ...],
    rows: tuple[Tensor, ...],
    *,
    of_keys: bool = False,
    extra: tuple[int, ...] = (),
) -> Callable[..., None]:
    """A launcher of a kernel whose programs have a tile of queries of a head each, or of keys.

    Args:
        kernel: it takes ``tensors``, then the sequences' starts and lengths and the seed, strides,
            sizes and numbers in the order below.
        a: the op's arguments.
        tensors: of the call, the last those that are added to the scores.
        rows: those of them that are read or written by rows, in the kernel's order.
        of_keys: a program has keys of a key head.
        extra: sizes that this kernel alone takes.

    Returns:
        ``run(launch, careful=False)``.
    """
    batch, heads, queries, d = a.query.shape
    key_heads, keys, dv = a.value.shape[1:]
    arguments = (
        *tensors,
        *(a.cu_seqlens_q, a.cu_seqlens_k, a.key_lengths, a.seed),
        *(stride for tensor in rows for stride in strides_of(tensor, 3)),
        *plane_strides_of(a),
        *(heads, heads // max(key_heads, 1), queries, keys),
    )
    length, starts = (keys, a.cu_seqlens_k) if of_keys else (queries, a.cu_seqlens_q)

    def run(launch: Launch, *, careful: bool = False) -> None:
        block = launch.block_n if of_keys else launch.block_m
        sequences, tiles, block_b = tile_count(a, block, length, starts)
        programs = tiles * (key_heads if of_keys else heads) * (1 if starts is not None else batch)
        described = launch.descriptors and not careful and describable(*rows)
        with descriptor_memory(a.query) if described else nullcontext():
            kernel[(programs,)](
                *arguments,
                *(sequences, tiles, *extra),
                *scalars_of(a),
                D=d,
                DV=dv,
                BLOCK_M=launch.block_m,
                BLOCK_N=launch.block_n,
                BLOCK_D=block_of(d),
                BLOCK_DV=block_of(dv),
                BLOCK_B=block_b,
                VECTOR=row_vector(d | dv, *rows),
                CAREFUL=careful,
                DESCRIPTORS=described,
                **terms_of(a),
                **launch.options,
            )

    return run
