r"""LSTM, GRU and Elman cells: everything of a step but its matrix products, forward and backward.

Forward, from the input's gates ``x`` and the hidden gates ``u = W h`` (a library product)::

    LSTM   i, f, o = sigmoid(x + u), g = tanh(x + u);   c' = f c + i g;   h' = o tanh(c')
    GRU    r, z = sigmoid(x + u);   n = tanh(x + r u);   h' = n + z (h - n)
    RNN    h' = tanh(x + u) or relu(x + u)

Backward, from the activated gates, the gradients of ``x`` and ``u`` and of the state before.

Why this way. A step of a sequence cannot start before the one before is done, so a layer costs its
number of steps times the latency of a step: a product (some 3 us) and one launch of these (some 2
us) replace the ten launches of a cell written in torch's functions. The kernels' own traffic (11
numbers a unit of an LSTM forward: 0.4 MB for 64 rows of 512 units in bf16, 0.1 us at 4.3 TB/s) is
nothing beside; therefore a program is one warp with eight units a thread, which makes as many
programs as there can be of 16-byte accesses. What keeps the weights on the chip between steps has
to be another kernel.

Rows whose length is over keep their state, and their output is 0. Every element is one program's:
results are bitwise reproducible and do not depend on the rows around.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    RowStrides,
    aligned,
    ceil_div,
    kernel,
    next_power_of_2,
    on_device,
    rounded,
    vector_width,
)

#: As ``enum class Cell`` of csrc/recurrent.h.
KINDS = {"lstm": 0, "gru": 1, "tanh": 2, "relu": 3}
_LSTM = tl.constexpr(0)
_GRU = tl.constexpr(1)
_TANH = tl.constexpr(2)


@dataclass(frozen=True)
class Launch:
    """The tile of a program, in rows and units: 256 elements, eight for each thread of a warp."""

    block_m: int
    block_n: int
    num_warps: int = 1


def launch_for(hidden: int) -> Launch:
    """Few units leave room for several rows."""
    block_n = min(256, next_power_of_2(hidden))
    return Launch(256 // block_n, block_n)


# fmt: off
# --- device --------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """``x + x^3 q(x^2)`` below 0.625 (the fit of csrc/cpu/tanh.h), a quotient above: 2 ulp."""
    square = x * x
    q = square * 0.002292744816178142 - 0.008343945515839152
    q = q * square + 0.02176891865102821
    q = q * square - 0.05395925957720454
    q = q * square + 0.1333330355691574
    q = q * square - 0.3333333317214036
    low = x + x * square * q
    size = tl.abs(x)
    high = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, low, tl.where(x < 0.0, -high, high))


@triton.jit
def _load(pointer, start, column, mask, VECTOR: tl.constexpr):
    return tl.load(aligned(pointer, start, column, VECTOR), mask, 0.0).to(tl.float32)


@triton.jit
def _store(pointer, start, column, x, mask, VECTOR: tl.constexpr):
    tl.store(aligned(pointer, start, column, VECTOR), rounded(x, pointer.dtype.element_ty), mask)


@triton.jit
def _place(
    rows, hidden, lengths, time, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Rows ``[M]`` in int64, columns and mask of this program's tile, and which rows take part."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    # Whole vectors exist or do not.
    mask = (row < rows)[:, None] & tl.max_constancy(column < hidden, (1, VECTOR))
    active = mask
    if lengths is not None:
        active = mask & (time < tl.load(lengths + row, row < rows, 0))[:, None]
    return row, column, mask, active


@kernel
def cell_forward_kernel(
    gates_x, gates_h, h, c, lengths, keep, h_new, output, operand, c_new, c_rounded, cells, saved,
    x_stride, rows, hidden, time, KIND: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One step. ``h_new`` may be ``h``, ``c_new`` may be ``c``: a program reads first.

    ``output`` has 0 where ``h_new`` keeps the state; ``operand`` is ``h_new * keep``; ``c_rounded``
    and ``cells`` are ``c_new`` in other dtypes. What is None is not wanted.
    """
    row, column, mask, active = _place(rows, hidden, lengths, time, VECTOR, BLOCK_M, BLOCK_N)
    x_row, one = row * x_stride, row * hidden
    if KIND == _LSTM:
        wide = 4 * one
        i = tl.sigmoid(_load(gates_x, x_row, column, active, VECTOR)
                       + _load(gates_h, wide, column, active, VECTOR))
        f = tl.sigmoid(_load(gates_x, x_row + hidden, column, active, VECTOR)
                       + _load(gates_h, wide + hidden, column, active, VECTOR))
        g = tanh(_load(gates_x, x_row + 2 * hidden, column, active, VECTOR)
                 + _load(gates_h, wide + 2 * hidden, column, active, VECTOR))
        o = tl.sigmoid(_load(gates_x, x_row + 3 * hidden, column, active, VECTOR)
                       + _load(gates_h, wide + 3 * hidden, column, active, VECTOR))
        before = _load(c, one, column, mask, VECTOR)
        cell = f * before + i * g
        result = o * tanh(cell)
        if cells is not None:
            _store(cells, one, column, tl.where(active, cell, 0.0), mask, VECTOR)
        cell = tl.where(active, cell, before)
        if c_new is not None:
            _store(c_new, one, column, cell, mask, VECTOR)
        if c_rounded is not None:
            _store(c_rounded, one, column, cell, mask, VECTOR)
        if saved is not None:
            _store(saved, wide, column, i, mask, VECTOR)
            _store(saved, wide + hidden, column, f, mask, VECTOR)
            _store(saved, wide + 2 * hidden, column, g, mask, VECTOR)
            _store(saved, wide + 3 * hidden, column, o, mask, VECTOR)
    elif KIND == _GRU:
        wide = 3 * one
        r = tl.sigmoid(_load(gates_x, x_row, column, active, VECTOR)
                       + _load(gates_h, wide, column, active, VECTOR))
        z = tl.sigmoid(_load(gates_x, x_row + hidden, column, active, VECTOR)
                       + _load(gates_h, wide + hidden, column, active, VECTOR))
        hn = _load(gates_h, wide + 2 * hidden, column, active, VECTOR)
        n = tanh(_load(gates_x, x_row + 2 * hidden, column, active, VECTOR) + r * hn)
        result = n + z * (_load(h, one, column, mask, VECTOR) - n)
        if saved is not None:
            _store(saved, 4 * one, column, r, mask, VECTOR)
            _store(saved, 4 * one + hidden, column, z, mask, VECTOR)
            _store(saved, 4 * one + 2 * hidden, column, n, mask, VECTOR)
            _store(saved, 4 * one + 3 * hidden, column, hn, mask, VECTOR)
    else:
        result = (_load(gates_x, x_row, column, active, VECTOR)
                  + _load(gates_h, one, column, active, VECTOR))
        if KIND == _TANH:
            result = tanh(result)
        else:
            result = tl.where(result < 0.0, 0.0, result)
        if saved is not None:
            _store(saved, one, column, result, mask, VECTOR)
    if output is not None:
        _store(output, one, column, tl.where(active, result, 0.0), mask, VECTOR)
    if h_new is not None:
        if lengths is not None:
            result = tl.where(active, result, _load(h, one, column, mask, VECTOR))
        _store(h_new, one, column, result, mask, VECTOR)
        if operand is not None:
            result = rounded(result, h_new.dtype.element_ty).to(tl.float32)
            result *= _load(keep, one, column, mask, VECTOR)
            _store(operand, one, column, result, mask, VECTOR)


@triton.jit
def _flow(product, direct, keep, one, column, mask, VECTOR: tl.constexpr):
    """The gradient of h that comes from the step after: through its product and beside it."""
    grad = tl.zeros(mask.shape, tl.float32)
    if direct is not None:
        grad = _load(direct, one, column, mask, VECTOR)
    if product is not None:
        through = _load(product, one, column, mask, VECTOR)
        if keep is not None:
            through *= _load(keep, one, column, mask, VECTOR)
        grad += through
    return grad


@triton.jit
def _before(
    states, initial, lengths, before, row, rows, one, column, mask, VECTOR: tl.constexpr
):
    """The state a step started from: that of the step before, or the first."""
    if states is None:
        found = _load(initial, one, column, mask, VECTOR)
    elif lengths is None:
        found = _load(states, one, column, mask, VECTOR)
    else:
        # Only the first step of a row that runs backwards has no step before it at this time.
        has = mask & (before < tl.load(lengths + row, row < rows, 0))[:, None]
        found = tl.where(has, _load(states, one, column, has, VECTOR),
                         _load(initial, one, column, mask & (has == 0), VECTOR))
    return found


@kernel
def cell_backward_kernel(
    grad_output, product, direct, keep, grad_c_in, grad_cells, saved, cells, h_before, h0, c_before,
    c0, lengths, grad_x, grad_h, direct_out, grad_c_out, output_stride, cells_stride, rows, hidden,
    time, before, clip, KIND: tl.constexpr, CUT: tl.constexpr, CARRY: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One step back. What is None is 0, or not wanted.

    The gradient of h' is ``grad_output + product * keep + direct``; ``direct_out`` (fp32) is the
    part of that of h that does not go through a product, and of rows that do not take part all of
    it. With ``CUT`` nothing flows on; the gradient of c is clamped to ``clip`` as it leaves.
    Without ``CARRY`` h' went through a projection first: then ``direct_out`` is the caller's.
    """
    row, column, mask, active = _place(rows, hidden, lengths, time, VECTOR, BLOCK_M, BLOCK_N)
    one = row * hidden
    flow = _flow(product, direct, keep, one, column, mask, VECTOR)
    grad = flow
    if grad_output is not None:
        grad += _load(grad_output, row * output_stride, column, active, VECTOR)
    if KIND == _LSTM:
        wide = 4 * one
        i = _load(saved, wide, column, active, VECTOR)
        f = _load(saved, wide + hidden, column, active, VECTOR)
        g = _load(saved, wide + 2 * hidden, column, active, VECTOR)
        o = _load(saved, wide + 3 * hidden, column, active, VECTOR)
        squashed = tanh(_load(cells, one, column, active, VECTOR))
        state = _before(c_before, c0, lengths, before, row, rows, one, column, active,
                        VECTOR)
        incoming = tl.zeros(mask.shape, tl.float32)
        if grad_c_in is not None:
            incoming = _load(grad_c_in, one, column, mask, VECTOR)
        total = incoming + grad * o * (1.0 - squashed * squashed)
        if grad_cells is not None:
            total += _load(grad_cells, row * cells_stride, column, active, VECTOR)
        _store(grad_x, wide, column, tl.where(active, total * g * i * (1.0 - i), 0.0), mask, VECTOR)
        _store(grad_x, wide + hidden, column,
               tl.where(active, total * state * f * (1.0 - f), 0.0), mask, VECTOR)
        _store(grad_x, wide + 2 * hidden, column,
               tl.where(active, total * i * (1.0 - g * g), 0.0), mask, VECTOR)
        _store(grad_x, wide + 3 * hidden, column,
               tl.where(active, grad * squashed * o * (1.0 - o), 0.0), mask, VECTOR)
        outgoing = total * f
        if clip is not None:
            outgoing = tl.where(outgoing > clip, clip, tl.where(outgoing < -clip, -clip, outgoing))
        if CUT:
            outgoing = tl.zeros(mask.shape, tl.float32)
        _store(grad_c_out, one, column, tl.where(active, outgoing, incoming), mask, VECTOR)
        straight = tl.zeros(mask.shape, tl.float32)
    elif KIND == _GRU:
        wide = 3 * one
        r = _load(saved, 4 * one, column, active, VECTOR)
        z = _load(saved, 4 * one + hidden, column, active, VECTOR)
        n = _load(saved, 4 * one + 2 * hidden, column, active, VECTOR)
        hn = _load(saved, 4 * one + 3 * hidden, column, active, VECTOR)
        state = _before(h_before, h0, lengths, before, row, rows, one, column, active,
                        VECTOR)
        grad_n = tl.where(active, grad * (1.0 - z) * (1.0 - n * n), 0.0)
        grad_r = grad_n * hn * r * (1.0 - r)
        grad_z = tl.where(active, grad * (state - n) * z * (1.0 - z), 0.0)
        _store(grad_x, wide, column, grad_r, mask, VECTOR)
        _store(grad_x, wide + hidden, column, grad_z, mask, VECTOR)
        _store(grad_x, wide + 2 * hidden, column, grad_n, mask, VECTOR)
        _store(grad_h, wide, column, grad_r, mask, VECTOR)
        _store(grad_h, wide + hidden, column, grad_z, mask, VECTOR)
        _store(grad_h, wide + 2 * hidden, column, grad_n * r, mask, VECTOR)
        straight = grad * z
    else:
        y = _load(saved, one, column, active, VECTOR)
        if KIND == _TANH:
            grad *= 1.0 - y * y
        else:
            grad = tl.where(y > 0.0, grad, 0.0)
        _store(grad_x, one, column, tl.where(active, grad, 0.0), mask, VECTOR)
        straight = tl.zeros(mask.shape, tl.float32)
    if CARRY:
        if CUT:
            straight = tl.zeros(mask.shape, tl.float32)
        _store(direct_out, one, column, tl.where(active, straight, flow), mask, VECTOR)


# fmt: on

# --- launchers -----------------------------------------------------------------------------------


def _wanted(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is not None and tensor.numel() else None


def _run_forward(tensors: tuple[Tensor | None, ...], time: int, kind: str, vector: int) -> None:
    """One launch; ``tensors`` are the kernel's in its order."""
    gates_x, gates_h = tensors[:2]
    assert gates_x is not None
    assert gates_h is not None
    rows = gates_x.shape[0]
    hidden = gates_h.shape[1] // (4, 3, 1, 1)[KINDS[kind]]
    launch = launch_for(hidden)
    cell_forward_kernel[(ceil_div(rows, launch.block_m), ceil_div(hidden, launch.block_n))](
        *tensors,
        gates_x.stride(0),
        rows,
        hidden,
        time,
        KIND=KINDS[kind],
        VECTOR=vector,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        num_warps=launch.num_warps,
    )


def _vector(hidden: int, strides: tuple[int, ...], *tensors: Tensor | None) -> int:
    return vector_width(hidden, [RowStrides(None, None, s) for s in strides], *tensors)


def cell_forward(
    gates_x: Tensor,
    gates_h: Tensor,
    h: Tensor,
    c: Tensor | None,
    kind: str,
    h_new: Tensor,
    c_new: Tensor,
    cells: Tensor,
    saved: Tensor,
) -> None:
    """Fills the last four; an empty one is not written. All are contiguous ``[B, n]``."""
    outputs = (h_new, None, None, None, _wanted(c_new), _wanted(cells), _wanted(saved))
    tensors = (gates_x, gates_h, h, c, None, None, *outputs)
    vector = _vector(h.shape[1], (gates_x.shape[1],), *tensors)
    with on_device(h):
        _run_forward(tensors, 0, kind, vector)


def forward(
    gates_x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    keep: Tensor | None,
    kind: str,
    reverse: bool,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    cells: Tensor,
    gates: Tensor,
) -> None:
    """Fills the last five, step by step; empty ``cells`` and ``gates`` are not written.

    Args:
        gates_x: ``[T, B, G H]``; the others as the op has them.
    """
    steps, batch, width = gates_x.shape
    if gates_x.stride(2) != 1 and width > 1:
        gates_x = gates_x.contiguous()
    hidden = width // (4, 3, 1, 1)[KINDS[kind]]
    state = h_n.copy_(h0)
    operand = state if keep is None else state * keep
    gates_h = gates_x.new_empty(batch, width)
    c = None if c0 is None else c0.to(torch.float32, copy=True)
    projected = weight_hr is not None
    unprojected = h0.new_empty(batch, hidden) if projected else None
    saves, keeps_cells = gates.numel() > 0, cells.numel() > 0
    strides = (gates_x.stride(0), gates_x.stride(1))
    vector = _vector(hidden, strides, gates_x, state, operand, output, gates, cells)
    with on_device(h0):
        for n in range(steps):
            t = steps - 1 - n if reverse else n
            if bias_hh is None:
                torch.mm(operand, weight_hh.t(), out=gates_h)
            else:
                torch.addmm(bias_hh, operand, weight_hh.t(), out=gates_h)
            if projected:
                results = (unprojected, None, None)
            else:
                results = (state, output[t], None if keep is None else operand)
            _run_forward(
                (
                    gates_x[t],
                    gates_h,
                    # A projected state has other units: whole steps are put in place below.
                    unprojected if projected else state,
                    c,
                    lengths,
                    keep if not projected else None,
                    *results,
                    c,
                    None,
                    cells[t] if keeps_cells else None,
                    gates[t] if saves else None,
                ),
                t,
                kind,
                vector,
            )
            if projected:
                assert weight_hr is not None
                new = unprojected @ weight_hr.t()
                if lengths is not None:
                    active = (t < lengths)[:, None]
                    output[t] = torch.where(active, new, 0.0)
                    new = torch.where(active, new, state)
                else:
                    output[t] = new
                state.copy_(new)
                if keep is not None:
                    torch.mul(state, keep, out=operand)
    if c is not None:
        c_n.copy_(c)


def cell_backward(
    saved: Tensor,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    cells: Tensor,
    h: Tensor,
    c: Tensor | None,
    kind: str,
    grad_gates_x: Tensor,
    grad_gates_h: Tensor,
    grad_h_old: Tensor,
    grad_c_old: Tensor,
) -> None:
    """Fills the last four; an empty one is not written. All are contiguous ``[B, n]``."""
    hidden = h.shape[1]
    inputs = (grad_h, None, None, None, grad_c, None, saved, _wanted(cells), None, h, None, c, None)
    outputs = (grad_gates_x, _wanted(grad_gates_h), grad_h_old, _wanted(grad_c_old))
    vector = _vector(hidden, (), *inputs, *outputs)
    with on_device(h):
        _run_backward((*inputs, *outputs), hidden, hidden, (0, -1), 0.0, kind, False, True, vector)


def _run_backward(
    tensors: tuple[Tensor | None, ...],
    output_stride: int,
    cells_stride: int,
    times: tuple[int, int],
    clip: float,
    kind: str,
    cut: bool,
    carry: bool,
    vector: int,
) -> None:
    saved = tensors[6]
    assert saved is not None
    rows, hidden = saved.shape[0], saved.shape[1] // (4, 4, 1, 1)[KINDS[kind]]
    launch = launch_for(hidden)
    cell_backward_kernel[(ceil_div(rows, launch.block_m), ceil_div(hidden, launch.block_n))](
        *tensors,
        output_stride,
        cells_stride,
        rows,
        hidden,
        *times,
        clip or None,
        KIND=KINDS[kind],
        CUT=cut,
        CARRY=carry,
        VECTOR=vector,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        num_warps=launch.num_warps,
    )


def backward(
    gates: Tensor,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    output: Tensor,
    cells: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    lengths: Tensor | None,
    keep: Tensor | None,
    kind: str,
    reverse: bool,
    bptt: int,
    grad_clip: float,
    grad_gates_x: Tensor,
    grad_gates_h: Tensor,
    grad_h0: Tensor,
    grad_c0: Tensor,
    projected: Tensor,
) -> None:
    """Fills the last five, step by step from the last; an empty one is not written."""
    steps, hidden = gates.shape[0], gates.shape[2] // (4, 4, 1, 1)[KINDS[kind]]
    if grad_output is not None and grad_output.stride(2) != 1:
        grad_output = grad_output.contiguous()
    if grad_cells is not None and grad_cells.stride(2) != 1:
        grad_cells = grad_cells.contiguous()
    direct = torch.zeros(h0.shape, dtype=torch.float32, device=h0.device)
    if grad_h_n is not None:
        direct.copy_(grad_h_n)
    grad_c = None
    if c0 is not None:
        grad_c = torch.zeros(c0.shape, dtype=torch.float32, device=h0.device)
        if grad_c_n is not None:
            grad_c.copy_(grad_c_n)
    through = grad_gates_h if grad_gates_h.numel() else grad_gates_x
    product: Tensor | None = None
    strides = (0, 0) if grad_output is None else grad_output.stride()[:2]
    strides += (0, 0) if grad_cells is None else grad_cells.stride()[:2]
    vector = _vector(
        hidden, strides, gates, grad_output, grad_cells, output, cells, h0, c0, keep,
        _wanted(grad_gates_x), _wanted(grad_gates_h),
    )  # fmt: skip
    with on_device(h0):
        for n in reversed(range(steps)):
            t = steps - 1 - n if reverse else n
            before = t + 1 if reverse else t - 1
            inside = 0 <= before < steps
            cut = bptt > 0 and n > 0 and n % bptt == 0
            came = None if grad_output is None else grad_output[t]
            if weight_hr is None:
                arriving = (came, product, direct, keep)
            else:
                flow = _flow_of(product, direct, keep)
                total = flow if came is None else flow + came
                if lengths is not None:
                    active = (t < lengths)[:, None]
                    total, flow = torch.where(active, total, 0.0), torch.where(active, 0.0, flow)
                else:
                    flow = torch.zeros_like(flow)
                projected[t] = total
                direct = flow
                arriving = (projected[t] @ weight_hr, None, None, None)
            _run_backward(
                (
                    *arriving,
                    grad_c,
                    None if grad_cells is None else grad_cells[t],
                    gates[t],
                    cells[t] if c0 is not None else None,
                    output[before] if inside and weight_hr is None else None,
                    h0 if weight_hr is None else None,
                    cells[before] if inside and c0 is not None else None,
                    c0,
                    lengths,
                    grad_gates_x[t],
                    grad_gates_h[t] if grad_gates_h.numel() else None,
                    direct if weight_hr is None else None,
                    grad_c,
                ),
                hidden if came is None or weight_hr is not None else came.stride(0),
                hidden if grad_cells is None else grad_cells.stride(1),
                (t, before),
                grad_clip,
                kind,
                cut,
                weight_hr is None,
                vector,
            )
            product = None if cut else through[t] @ weight_hh
            if grad_clip:
                flow = _flow_of(product, direct, keep)
                clipped = flow.clamp(-grad_clip, grad_clip)
                if lengths is not None:
                    clipped = torch.where((t < lengths)[:, None], clipped, flow)
                product, direct = None, clipped
    grad_h0.copy_(_flow_of(product, direct, keep))
    if grad_c is not None:
        grad_c0.copy_(grad_c)


def _flow_of(product: Tensor | None, direct: Tensor, keep: Tensor | None) -> Tensor:
    """As the kernel's: the gradient of h that comes from the step after."""
    if product is None:
        return direct
    return direct + (product if keep is None else product * keep)
