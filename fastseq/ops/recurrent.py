"""The recurrent ops: schemas, fakes, candidates.

A forward and a backward op run one layer in one direction through all its steps, from the input's
gates, which are one product made before. The backward leaves the gradients of these gates, of which
those of the weights are one product each made after: ``recurrent_layer.py`` has both, and autograd.
With layer norm the norm of the input's gates happens before too; those of the hidden gates and of
the cell are inside.

A result that a call does not have is an empty tensor. The public functions are in
``fastseq/functional/recurrent.py``; single steps in ``recurrent_cell.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
Run = Callable[[Any], Sequence[Tensor]]
Rejects = Callable[[Any], str | None]
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
    return h, c, threshold(h) if h else 0, threshold(c) if c else 0


def _forward_by_extension(a: Forward) -> Tensors7:
    result: Tensors7 = _extension_forward(
        _steps(a.gates_x), *a[1:12], KINDS[a.kind], a.reverse, *_zoneout(a), a.eps, a.save, _tf32(a)
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
        _tf32(a),
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
    directions: int = 1,
) -> dict[str, str]:
    """How a persistent CUDA kernel runs a layer in one direction or both, or why none does.

    ``csrc/cuda/recurrent_plan.h`` has the choice; the figures are for people and tests.

    Args:
        kind: ``lstm``, ``gru``, ``tanh`` or ``relu``.
        backward: the plan of the backward.
        device: the CUDA device whose limits count, where ``chip`` is None.
        chip: multiprocessors, bytes of shared memory a block can have, blocks of a cluster.
        tf32: fp32 products by tensor cores.
        directions: 2 for both directions of a layer, side by side in one launch.

    Returns:
        ``exchange`` (``block``, ``cluster`` or ``grid``), ``blocks`` of a group, ``groups`` of a
        direction, how many groups run ``at_once``, in how many ``waves``, and so on; or
        ``rejected`` alone, with the reason.
    """
    limits = [] if chip is None else list(chip)
    numbers = (batch, hidden, backward, directions, device, limits)
    text = _extension_plan(KINDS[kind], dtype, tf32, *numbers)
    reason = text.removeprefix("rejected: ")
    if reason != text:
        return {"rejected": reason}
    return dict(field.split("=") for field in text.split())


@lru_cache(maxsize=1024)
def _no_plan(*task: Any) -> str | None:
    return persistent_plan(*task).get("rejected")


def _tf32(a: Forward | Backward) -> bool:
    """Whether fp32 products may be rounded, as torch decides for the layer's other products."""
    if not a.h0.is_cuda or a.h0.dtype != torch.float32:
        return False
    # Not allow_tf32: it raises once somebody has set fp32_precision.
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _cuda_rejects(a: Forward | Backward, directions: int = 1) -> str | None:
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
    task = (a.kind, a.h0.dtype, *a.h0.shape, backward)
    return _no_plan(*task, a.h0.get_device(), None, _tf32(a), directions)


def candidates(
    extension: Run,
    triton: Run,
    reference: Run,
    cuda_rejects: Rejects = _cuda_rejects,
    triton_rejects: Rejects = _triton_rejects,
) -> tuple[Candidate, ...]:
    """Those of a forward or a backward op, of one direction or of two."""
    return (
        Candidate("cpu", extension),
        Candidate("cuda", extension, cuda_rejects),
        Candidate("triton", triton, triton_rejects),
        Candidate("reference", reference),
    )


forward_op = define_op(
    _FORWARD,
    Forward,
    forward_outputs,
    candidates(_forward_by_extension, _forward_by_triton, _forward_by_reference),
)

backward_op = define_op(
    _BACKWARD,
    Backward,
    backward_outputs,
    candidates(_backward_by_extension, _backward_by_triton, _backward_by_reference),
)
