"""The recurrent ops: schemas, fakes, candidates, autograd.

A forward and a backward op run one layer in one direction through all its steps, from the input's
gates, which are one library product made before. The backward leaves the gradients of these gates,
of which those of the weights are one library product each made after. With layer norm the norm of
the input's gates happens before too; those of the hidden gates and of the cell are inside.

A result that a call does not have is an empty tensor. The public functions are in
``fastseq/functional/recurrent.py``; single steps in ``recurrent_cell.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import Candidate, current_backend
from ..random import threshold
from ..reference import recurrent as reference
from ..reference.layer_norm import compute_dtype
from ..reference.recurrent import GATES, SAVED, Options, Parameters, States
from ._op import define_op, extension_op

_extension_forward = extension_op("recurrent_forward")
_extension_backward = extension_op("recurrent_backward")
_extension_plan = extension_op("recurrent_plan")
#: As ``enum class Cell`` of csrc/recurrent.h.
KINDS = {"lstm": 0, "gru": 1, "tanh": 2, "relu": 3}
Tensors6 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Tensors7 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# --- forward -------------------------------------------------------------------------------------

_FORWARD = """_recurrent_fwd(
    Tensor gates_x, Tensor h0, Tensor? c0, Tensor weight_hh, Tensor? bias_hh, Tensor? weight_hr,
    Tensor? norm_hh, Tensor? norm_c, Tensor? bias_c, Tensor? lengths, Tensor? seed, Tensor? keep,
    str kind, bool reverse, float zoneout_h, float zoneout_c, float eps, bool save
) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor gates, Tensor normalized,
    Tensor statistics)"""


class Forward(NamedTuple):
    """The arguments of the forward op; see ``Parameters``, ``Options`` and ``sequence`` of the
    reference. ``save`` asks for what the backward needs, and for the cells."""

    gates_x: Tensor
    h0: Tensor
    c0: Tensor | None
    weight_hh: Tensor
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    norm_hh: Tensor | None
    norm_c: Tensor | None
    bias_c: Tensor | None
    lengths: Tensor | None
    seed: Tensor | None
    keep: Tensor | None
    kind: str
    reverse: bool
    zoneout_h: float
    zoneout_c: float
    eps: float
    save: bool

    @property
    def parameters(self) -> Parameters:
        """Those of the reference."""
        return Parameters(*self[3:9])

    @property
    def options(self) -> Options:
        """Those of the reference."""
        return Options(self.kind, self.reverse, self.zoneout_h, self.zoneout_c, self.eps)


def forward_outputs(a: Forward) -> Tensors7:
    """Uninitialised outputs, the fake's too."""
    steps, batch, width = a.gates_x.shape
    hidden, lstm = width // GATES[a.kind], a.kind == "lstm"
    dtype, compute = a.h0.dtype, compute_dtype(a.h0.dtype)

    def made(present: bool, size: int, dtype: torch.dtype = dtype) -> Tensor:
        return a.h0.new_empty((steps, batch, size) if present else (0,), dtype=dtype)

    norm = a.save and a.norm_hh is not None
    return (
        made(True, a.h0.shape[1]),
        a.h0.new_empty(a.h0.shape),
        a.h0.new_empty((batch, hidden) if lstm else (0,)),
        made(lstm and a.save, hidden, compute),
        made(a.save, SAVED[a.kind] * hidden),
        made(norm, width),
        made(norm, 3, compute),
    )


def _zoneout(a: Forward | Backward) -> tuple[float, float, int, int]:
    h, c = a.zoneout_h, a.zoneout_c
    return h, c, threshold(h), threshold(c)


def _forward_by_extension(a: Forward) -> Tensors7:
    result: Tensors7 = _extension_forward(
        _steps(a.gates_x), *a[1:12], KINDS[a.kind], a.reverse, *_zoneout(a), a.eps, a.save, _tf32()
    )
    return result


def _steps(tensor: Tensor | None) -> Tensor | None:
    """A tensor ``[T, B, n]`` whose rows are contiguous."""
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def _forward_by_triton(a: Forward) -> Tensors7:
    from ..kernels import recurrent

    outputs = forward_outputs(a)
    if a.gates_x.numel():
        recurrent.forward(*a[:6], a.lengths, a.keep, a.kind, a.reverse, *outputs[:5])
    return outputs


def _forward_by_reference(a: Forward) -> Tensors7:
    states = reference.sequence(
        a.gates_x, a.h0, a.c0, a.parameters, a.lengths, a.seed, a.keep, a.options
    )
    made = (
        states.output,
        states.h_n,
        states.c_n,
        states.cells,
        states.gates,
        states.normalized,
        states.statistics,
    )
    return tuple(  # type: ignore[return-value]
        tensor.contiguous() if i < 3 or a.save else tensor.new_empty(0)
        for i, tensor in enumerate(made)
    )


# --- backward ------------------------------------------------------------------------------------

_BACKWARD = """_recurrent_bwd(
    Tensor gates, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells,
    Tensor output, Tensor cells, Tensor normalized, Tensor statistics,
    Tensor h0, Tensor? c0, Tensor weight_hh, Tensor? weight_hr,
    Tensor? norm_hh, Tensor? norm_c, Tensor? bias_c, Tensor? lengths, Tensor? seed, Tensor? keep,
    str kind, bool reverse, float zoneout_h, float zoneout_c, int bptt, float grad_clip
) -> (Tensor gates_x, Tensor gates_h, Tensor h0, Tensor c0, Tensor projected, Tensor rows)"""


class Backward(NamedTuple):
    """The arguments of the backward op; see ``sequence_backward`` of the reference."""

    gates: Tensor
    grad_output: Tensor | None
    grad_h_n: Tensor | None
    grad_c_n: Tensor | None
    grad_cells: Tensor | None
    output: Tensor
    cells: Tensor
    normalized: Tensor
    statistics: Tensor
    h0: Tensor
    c0: Tensor | None
    weight_hh: Tensor
    weight_hr: Tensor | None
    norm_hh: Tensor | None
    norm_c: Tensor | None
    bias_c: Tensor | None
    lengths: Tensor | None
    seed: Tensor | None
    keep: Tensor | None
    kind: str
    reverse: bool
    zoneout_h: float
    zoneout_c: float
    bptt: int
    grad_clip: float


def backward_outputs(a: Backward) -> Tensors6:
    """Uninitialised gradients, the fake's too."""
    steps, batch, saved = a.gates.shape
    hidden = saved // SAVED[a.kind]
    width, empty = GATES[a.kind] * hidden, a.h0.new_empty
    gates, norm = (steps, batch, width), a.norm_hh is not None
    return (
        empty(gates),
        empty(gates if norm or a.kind == "gru" else (0,)),
        empty(a.h0.shape),
        empty((batch, hidden) if a.c0 is not None else (0,)),
        empty(a.output.shape if a.weight_hr is not None else (0,)),
        empty((batch, 2 * (width + hidden)) if norm else (0,), dtype=compute_dtype(a.h0.dtype)),
    )


def _backward_by_extension(a: Backward) -> Tensors6:
    grad_output, grad_h_n, grad_c_n, grad_cells = a[1:5]
    result: Tensors6 = _extension_backward(
        a.gates,
        _steps(grad_output),
        None if grad_h_n is None else grad_h_n.contiguous(),
        None if grad_c_n is None else grad_c_n.contiguous(),
        _steps(grad_cells),
        *a[5:19],
        KINDS[a.kind],
        a.reverse,
        *_zoneout(a),
        a.bptt,
        a.grad_clip,
        _tf32(),
    )
    return result


def _backward_by_triton(a: Backward) -> Tensors6:
    from ..kernels import recurrent

    outputs = backward_outputs(a)
    if a.gates.numel():
        recurrent.backward(
            *a[:7],
            *a[9:13],
            a.lengths,
            a.keep,
            a.kind,
            a.reverse,
            a.bptt,
            a.grad_clip,
            *outputs[:5],
        )
    return outputs


def _backward_by_reference(a: Backward) -> Tensors6:
    empty = a.h0.new_empty(0)
    gradients = reference.sequence_backward(
        (a.grad_output, a.grad_h_n, a.grad_c_n, a.grad_cells),
        States(a.output, empty, empty, a.cells, a.gates, a.normalized, a.statistics),
        a.h0,
        a.c0,
        Parameters(a.weight_hh, None, a.weight_hr, a.norm_hh, a.norm_c, a.bias_c),
        a.lengths,
        a.seed,
        a.keep,
        Options(a.kind, a.reverse, a.zoneout_h, a.zoneout_c, bptt=a.bptt, grad_clip=a.grad_clip),
    )
    return tuple(gradients)  # type: ignore[return-value]


# --- candidates ----------------------------------------------------------------------------------


def _triton_rejects(a: Forward | Backward) -> str | None:
    if a.h0.dtype == torch.float64:
        return "no fp64 kernel"
    if a.norm_hh is not None:
        return "no kernel with layer norm"
    if a.zoneout_h or a.zoneout_c:
        return "no kernel with zoneout"
    return None


def persistent_plan(
    kind: str,
    dtype: torch.dtype,
    batch: int,
    hidden: int,
    backward: bool,
    device: int = 0,
    chip: tuple[int, int, int] | None = None,
    tf32: bool = False,
) -> dict[str, str]:
    """How a persistent CUDA kernel runs a layer in one direction, or why none does.

    ``csrc/cuda/recurrent_plan.h`` has the choice; the figures are for people and tests.

    Args:
        kind: ``lstm``, ``gru``, ``tanh`` or ``relu``.
        backward: the plan of the backward.
        device: the CUDA device whose limits count, where ``chip`` is None.
        chip: multiprocessors, bytes of shared memory a block can have, blocks of a cluster.
        tf32: fp32 products by tensor cores.

    Returns:
        ``exchange`` (``block`` or ``cluster``), ``blocks`` of a group, ``groups`` and so on; or
        ``rejected`` alone, with the reason.
    """
    limits = [] if chip is None else list(chip)
    text = _extension_plan(KINDS[kind], dtype, tf32, batch, hidden, backward, device, limits)
    reason = text.removeprefix("rejected: ")
    if reason != text:
        return {"rejected": reason}
    return dict(field.split("=") for field in text.split())


@lru_cache(maxsize=1024)
def _no_plan(*task: Any) -> str | None:
    return persistent_plan(*task).get("rejected")


def _tf32() -> bool:
    """Whether fp32 products may be rounded, as torch decides for the layer's other products."""
    return bool(torch.backends.cuda.matmul.allow_tf32)


def _cuda_rejects(a: Forward | Backward) -> str | None:
    reason = _triton_rejects(a)
    if reason is not None:
        return reason
    if a.weight_hr is not None:
        return "no persistent kernel with projection"
    steps = a[0].shape[0]
    if not a[0].numel():
        return "no steps or no elements"
    # 5 us a step by a library product and a kernel, against some 10 to 20 for a launch that first
    # reads all weights: an estimate, so one who asks for the kernel gets it.
    if steps < 4 and current_backend() == "auto":
        return "few steps: bringing the weights onto the chip costs more than it saves"
    backward = isinstance(a, Backward)
    tf32 = a.h0.dtype == torch.float32 and _tf32()
    return _no_plan(a.kind, a.h0.dtype, *a.h0.shape, backward, a.h0.get_device(), None, tf32)


forward_op = define_op(
    _FORWARD,
    Forward,
    forward_outputs,
    (
        Candidate("cpu", _forward_by_extension),
        Candidate("cuda", _forward_by_extension, _cuda_rejects),
        Candidate("triton", _forward_by_triton, _triton_rejects),
        Candidate("reference", _forward_by_reference),
    ),
)

backward_op = define_op(
    _BACKWARD,
    Backward,
    backward_outputs,
    (
        Candidate("cpu", _backward_by_extension),
        Candidate("cuda", _backward_by_extension, _cuda_rejects),
        Candidate("triton", _backward_by_triton, _triton_rejects),
        Candidate("reference", _backward_by_reference),
    ),
)


# --- autograd ------------------------------------------------------------------------------------


class RecurrentFunction(torch.autograd.Function):
    """Saves the activated gates and the cells; one product a weight gives its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        gates_x: Tensor,
        h0: Tensor,
        c0: Tensor | None,
        weight_hh: Tensor,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
        norm_hh: Tensor | None,
        norm_c: Tensor | None,
        bias_c: Tensor | None,
        lengths: Tensor | None,
        seed: Tensor | None,
        keep: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parameters = (weight_hh, bias_hh, weight_hr, norm_hh, norm_c, bias_c)
        output, h_n, c_n, cells, *saved = forward_op(
            gates_x, h0, c0, *parameters, lengths, seed, keep, *options[:5], True
        )
        ctx.save_for_backward(
            gates_x, h0, c0, *parameters, lengths, seed, keep, output, cells, *saved
        )
        ctx.options = options
        ctx.set_materialize_grads(False)
        return output, h_n, c_n, cells

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, options, needs = ctx.saved_tensors, ctx.options, ctx.needs_input_grad
        if all(grad is None for grad in grads):
            return (None,) * 13
        # With create_graph the gradient must be differentiable itself: the reference is.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return (*_differentiable(saved[:12], options, needs, grads), *(None,) * 4)
        gates_x, h0, c0, *parameters, lengths, seed, keep, output, cells = saved[:14]
        gates, normalized, statistics = saved[14:]
        weight_hh, _, weight_hr, norm_hh, norm_c, bias_c = parameters
        if c0 is None:
            grads = (*grads[:2], None, None)
        grad_gates_x, grad_gates_h, grad_h0, grad_c0, projected, rows = backward_op(
            gates,
            *grads,
            output,
            cells,
            normalized,
            statistics,
            h0,
            c0,
            weight_hh,
            weight_hr,
            norm_hh,
            norm_c,
            bias_c,
            lengths,
            seed,
            keep,
            *options[:4],
            *options[5:],
        )
        if norm_hh is None and options.kind != "gru":
            grad_gates_h = grad_gates_x
        made = _Made(output, cells, gates, statistics, h0, c0, lengths, keep)
        return (
            grad_gates_x if needs[0] else None,
            grad_h0 if needs[1] else None,
            grad_c0 if needs[2] else None,
            _grad_weight_hh(grad_gates_h, made, options) if needs[3] else None,
            _grad_bias_hh(grad_gates_h, rows, norm_hh) if needs[4] else None,
            _grad_weight_hr(projected, made, norm_c, bias_c, options) if needs[5] else None,
            *_grad_norms(rows, gates_x.shape[-1], (norm_hh, norm_c, bias_c), needs[6:9]),
            *(None,) * 4,
        )


class _Made(NamedTuple):
    """What the forward of a layer-direction left, and what it started from."""

    output: Tensor
    cells: Tensor
    gates: Tensor
    statistics: Tensor
    h0: Tensor
    c0: Tensor | None
    lengths: Tensor | None
    keep: Tensor | None


def _grad_weight_hh(grad_gates: Tensor, made: _Made, options: Options) -> Tensor:
    """The sum over steps of ``grad_gates[t]^T h[t - 1]``, of all steps but the first at once.

    The first starts from ``h0``; where rows differ in their first step, or h is masked before the
    product, all of them are written down beforehand.
    """
    output, reverse = made.output, options.reverse
    if made.keep is not None or (made.lengths is not None and reverse):
        before = reference.hidden_before(output, made.h0, made.lengths, reverse, made.keep)
        return grad_gates.flatten(0, 1).t() @ before.flatten(0, 1)
    first = grad_gates[-1 if reverse else 0].t()
    if output.shape[0] == 1:
        return first @ made.h0
    later, before = (grad_gates[:-1], output[1:]) if reverse else (grad_gates[1:], output[:-1])
    return (later.flatten(0, 1).t() @ before.flatten(0, 1)).addmm_(first, made.h0)


def _grad_bias_hh(grad_gates: Tensor, rows: Tensor, norm_hh: Tensor | None) -> Tensor:
    if norm_hh is None:
        return grad_gates.sum((0, 1))
    width = grad_gates.shape[-1]
    return rows[:, width : 2 * width].sum(0).to(norm_hh.dtype)


def _grad_weight_hr(
    projected: Tensor, made: _Made, norm_c: Tensor | None, bias_c: Tensor | None, options: Options
) -> Tensor:
    """As of any linear layer, from its input ``o tanh(c)``, which is computed again."""
    compute = made.cells.dtype
    i, f, g, o = made.gates.to(compute).chunk(4, -1)
    cells = made.cells
    if options.zoneout_c:
        assert made.c0 is not None
        start = (made.c0, made.lengths, options.reverse, None)
        cells = f * reference.hidden_before(made.cells, *start) + i * g
    if norm_c is not None:
        cells = (cells - made.statistics[..., 1:2]) * made.statistics[..., 2:] * norm_c
        cells = cells if bias_c is None else cells + bias_c
    unprojected = (o * cells.tanh()).to(projected.dtype)
    return projected.flatten(0, 1).t() @ unprojected.flatten(0, 1)


def _grad_norms(
    rows: Tensor,
    width: int,
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Of norm_hh, norm_c and bias_c."""
    hidden = 0 if parameters[0] is None else rows.shape[1] // 2 - width
    starts = ((0, width), (2 * width, hidden), (2 * width + hidden, hidden))
    return tuple(
        rows[:, start : start + size].sum(0).to(parameter.dtype)
        if parameter is not None and want
        else None
        for (start, size), parameter, want in zip(starts, parameters, wanted, strict=True)
    )


def _differentiable(
    inputs: tuple[Tensor | None, ...],
    options: Options,
    wanted: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of the first nine inputs that can be differentiated again: the reference's."""
    aliases: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
    gates_x, h0, c0 = aliases[:3]
    lengths, seed, keep = aliases[9:]
    states = reference.sequence(
        gates_x, h0, c0, Parameters(*aliases[3:9]), lengths, seed, keep, options
    )
    pairs = [(o, g) for o, g in zip(states[:4], grads, strict=True) if g is not None and o.numel()]
    chosen = [a for a, want in zip(aliases[:9], wanted, strict=False) if want and a is not None]
    found = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            chosen,
            [grad for _, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(
        next(found) if want and alias is not None else None
        for alias, want in zip(aliases[:9], wanted, strict=False)
    )
