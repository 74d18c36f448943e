"""What several processes do together, checked in one start of four: each costs seconds.

``python tests/integration/distributed_checks.py`` runs all, over gloo on the CPU; those for fewer
processes on a group of the first ones. ``test_distributed.py`` reads what it prints.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import fastseq
from fastseq import distributed
from fastseq.distributed import join_sequence, ring_attention, split_sequence
from fastseq.functional import attention
from fastseq.ops import attention_blockwise

WORLD = 4
CHECKS: dict[str, tuple[int, Callable[[Any], None]]] = {}
GROUPS: dict[int, Any] = {}  # of the first so many processes


def check(*sizes: int) -> Callable[..., Any]:
    """For groups of these sizes."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        for size in sizes:
            CHECKS[f"{function.__name__}-{size}"] = (size, function)
        return function

    return register


def raises(kind: type[BaseException], words: str, function: Callable[[], Any]) -> None:
    try:
        function()
    except kind as error:
        message = str(error)
    else:
        raise AssertionError(f"no {kind.__name__} with {words!r}")
    assert words in message, f"{words!r} is not in {message}"


# --- ring attention ------------------------------------------------------------------------------


def inputs(dtype: torch.dtype = torch.float64, length: int = 48) -> list[Tensor]:
    """Whole query, key, value and gradients of output and lse; two query heads for a key head."""
    torch.manual_seed(0)
    shapes = (2, 4, length, 16), (2, 2, length, 16), (2, 2, length, 8), (2, 4, length, 8)
    made = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    width = torch.promote_types(dtype, torch.float32)
    return [*made, torch.randn(2, 4, length, dtype=torch.float64).to(width)]


def results(
    function: Callable[..., Any], tensors: list[Tensor], **options: Any
) -> tuple[Tensor, ...]:
    """Output, lse and the gradients of all three, of gradients of output and lse."""
    *leaves, grad_output, grad_lse = (t.clone() for t in tensors)
    leaves = [t.requires_grad_() for t in leaves]
    output, lse = function(*leaves, return_lse=True, **options)
    grads = torch.autograd.grad((output, lse), leaves, (grad_output, grad_lse))
    return output.detach(), lse.detach(), *grads


def ring_results(group: Any, tensors: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    parts = [split_sequence(t, 2, group) for t in tensors]
    made = results(lambda *qkv, **more: ring_attention(*qkv, group, **more), parts, **options)
    return tuple(join_sequence(part, 2, group) for part in made)


@check(1, 2, 3, 4)
def ring_equals_one_process(group: Any) -> None:
    tensors = inputs()
    for options in ({}, {"causal": True}, {"causal": True, "softcap": 2.0, "scale": 0.5}):
        expected = results(attention, tensors, **options)
        made = ring_results(group, tensors, **options)
        for name, ours, theirs in zip(
            ("out", "lse", "dq", "dk", "dv"), made, expected, strict=True
        ):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12, msg=name)


def check_rounding(
    group: Any, dtype: torch.dtype, backends: tuple[str, ...], length: int = 48
) -> None:
    """Off by at most twice what one process is off by in the same dtype."""
    tensors = inputs(dtype, length)
    exact = [t.double() for t in tensors]
    for causal in (False, True):
        truth = results(attention, exact, causal=causal)
        for backend in backends:
            with fastseq.use_backend(backend):
                alone = results(attention, tensors, causal=causal)
                made = ring_results(group, tensors, causal=causal)
            for ours, theirs, right in zip(made, alone, truth, strict=True):
                assert ours.dtype == theirs.dtype
                for norm in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
                    allowed = 2 * norm(theirs - right)
                    allowed += 4 * torch.finfo(theirs.dtype).eps * norm(right)
                    assert norm(ours - right) <= allowed, (backend, causal, norm(ours - right))


@check(2, 4)
def ring_rounds_as_one_process(group: Any) -> None:
    check_rounding(group, torch.float32, ("auto", "torch"))
    check_rounding(group, torch.bfloat16, ("auto", "torch"))


@check(2)
def ring_on_triton(group: Any) -> None:
    """Its kernels take delta from output and lse, which are those of all keys."""
    check_rounding(group, torch.float32, ("triton",), length=12)


@check(3)
def ring_repeats_to_the_bit(group: Any) -> None:
    tensors = inputs(torch.bfloat16)
    first, second = (ring_results(group, tensors, causal=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@check(2)
def ring_takes_any_leading_dimensions_and_strides(group: Any) -> None:
    query, key, value, *_ = inputs()
    expected = attention(query, key, value, causal=True)
    parts = [split_sequence(t, 2, group) for t in (query, key, value)]
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in parts]
    made = join_sequence(ring_attention(*strided, group, causal=True), 2, group)
    torch.testing.assert_close(made, expected)
    one = ring_attention(*(t[0] for t in parts), group, causal=True)
    torch.testing.assert_close(join_sequence(one, 1, group), expected[0])
    with torch.autocast("cpu", torch.bfloat16):
        narrow = ring_attention(*(t.float() for t in parts), group, causal=True)
    assert narrow.dtype == torch.bfloat16


@check(2)
def ring_gives_the_gradients_that_are_wanted(group: Any) -> None:
    tensors = inputs()
    expected = results(attention, tensors, causal=True)[2:]
    for wanted in range(3):
        parts = [split_sequence(t, 2, group) for t in tensors[:3]]
        parts[wanted].requires_grad_()
        output, lse = ring_attention(*parts, group, causal=True, return_lse=True)
        weights = [split_sequence(t, 2, group) for t in tensors[3:]]
        ((output * weights[0]).sum() + (lse * weights[1]).sum()).backward()
        grad = join_sequence(parts[wanted].grad, 2, group)
        torch.testing.assert_close(grad, expected[wanted])
    # Of lse alone, where there is no gradient of the output.
    part = split_sequence(tensors[0], 2, group).requires_grad_()
    keys = [split_sequence(t, 2, group) for t in tensors[1:3]]
    ring_attention(part, *keys, group, return_lse=True)[1].sum().backward()
    whole = tensors[0].clone().requires_grad_()
    attention(whole, *tensors[1:3], return_lse=True)[1].sum().backward()
    torch.testing.assert_close(join_sequence(part.grad, 2, group), whole.grad)


@check(4)
def ring_is_balanced_and_leaves_out_what_is_masked(group: Any) -> None:
    pairs = 0

    def counting(*arguments: Any) -> tuple[Tensor, Tensor]:
        nonlocal pairs
        query, key = arguments[:2]
        pairs += query.shape[2] * key.shape[2]
        return original(*arguments)

    original, distributed.forward_op = distributed.forward_op, counting
    try:
        ring_attention(*(split_sequence(t, 2, group) for t in inputs()[:3]), group, causal=True)
    finally:
        distributed.forward_op = original
    each = [torch.zeros((), dtype=torch.int64) for _ in range(4)]
    dist.all_gather(each, torch.tensor(pairs), group=group)
    # Its own part, of which the op leaves out the masked half itself, and half of the other three.
    assert [int(n) for n in each] == [12 * 12 + 3 * 12 * 12 // 2] * 4


@check(3)
def ring_computes_while_messages_travel(group: Any) -> None:
    events: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append(name)
            return function(*args)

        return call

    originals = distributed.forward_op, distributed.backward_op
    ring, passing = distributed._Ring, distributed._Passing
    shift, wait = ring.shift, passing.wait
    distributed.forward_op, distributed.backward_op = (watched("compute", f) for f in originals)
    ring.shift = lambda self, message, tag: watched(("keys", "sums")[tag], shift)(
        self, message, tag
    )
    passing.wait = watched("wait", wait)
    try:
        parts = [split_sequence(t, 2, group).requires_grad_() for t in inputs()[:3]]
        output = ring_attention(*parts, group, causal=True)
        forward = " ".join(events)
        events.clear()
        output.sum().backward()
        backward = " ".join(events)
    finally:
        (distributed.forward_op, distributed.backward_op) = originals
        ring.shift, passing.wait = shift, wait
    assert forward == "keys compute wait keys compute wait compute", forward
    assert backward == (
        "keys compute sums wait keys compute wait sums wait compute wait sums wait"
    ), backward


@check(4)
def ring_memory_is_that_of_a_part(group: Any) -> None:
    """The same sequence over 1, 2 and 4 processes: what one allocates falls with their number."""
    length, width = 2048, 64
    peaks, largest = {}, {}
    attention_blockwise.BLOCK_ELEMENTS["cpu"], kept = (
        1 << 13,
        attention_blockwise.BLOCK_ELEMENTS["cpu"],
    )
    for size in (1, 2, 4):
        if dist.get_rank() >= size:
            continue
        torch.manual_seed(0)
        parts = [torch.randn(1, 1, length // size, width, requires_grad=True) for _ in range(3)]
        gradient = torch.randn(1, 1, length // size, width)
        with torch.profiler.profile(profile_memory=True) as profile:
            output = ring_attention(*parts, GROUPS[size], causal=True)
            torch.autograd.grad(output, parts, gradient)
        sizes: list[int] = []
        total = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                sizes.append(event.nbytes())
                total += event.nbytes()
                peak = max(peak, total)
        peaks[size], largest[size] = peak, max(sizes)
    attention_blockwise.BLOCK_ELEMENTS["cpu"] = kept
    if dist.get_rank() < 2:
        assert peaks[4] < 0.6 * peaks[2], peaks
        # The largest is a message of keys and values; the whole scores would be 128 of it.
        message = 2 * length // 4 * width * 4
        assert largest[4] <= message, (largest, message)
    if dist.get_rank() == 0:
        # A ring of one has no second buffers.
        assert peaks[2] < 0.85 * peaks[1], peaks


@check(2)
def ring_errors_name_the_argument(group: Any) -> None:
    query, key, value = (split_sequence(t, 2, group) for t in inputs()[:3])
    short = key[:, :, :-2], value[:, :, :-2]
    calls: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (
            RuntimeError,
            "key must have the query's length 24",
            lambda: ring_attention(query, *short, group, causal=True),
        ),
        (
            RuntimeError,
            "query must be two chunks",
            lambda: ring_attention(
                query[:, :, 1:], key[:, :, 1:], value[:, :, 1:], group, causal=True
            ),
        ),
        (
            RuntimeError,
            "key must have the query's dtype",
            lambda: ring_attention(query, key.float(), value, group),
        ),
        (
            ValueError,
            "softcap must be positive",
            lambda: ring_attention(query, key, value, group, softcap=-1.0),
        ),
        (
            NotImplementedError,
            "query must be fp32",
            lambda: ring_attention(query.long(), key, value, group),
        ),
        (
            RuntimeError,
            "outside torch.func",
            lambda: torch.func.grad(lambda q: ring_attention(q, key, value, group).sum())(query),
        ),
        (
            ValueError,
            "tensor must have a length that 4",
            lambda: split_sequence(query[:, :, :6], 2, group),
        ),
        (ValueError, "tensor must be two chunks", lambda: join_sequence(query[:, :, :5], 2, group)),
    ]
    for kind, words, call in calls:
        raises(kind, words, call)
    # A second derivative would need a third ring: it says so, and does not give a wrong one.
    query.requires_grad_()
    (grad,) = torch.autograd.grad(
        ring_attention(query, key, value, group).square().sum(), query, create_graph=True
    )
    raises(RuntimeError, "differentiate twice", grad.sum().backward)


@check(2)
def ring_compares_arguments_when_debugging(group: Any) -> None:
    query, key, value = (split_sequence(t, 2, group) for t in inputs()[:3])
    dist.set_debug_level(dist.DebugLevel.INFO)
    try:
        ring_attention(query, key, value, group)
        last = -1 if dist.get_rank() else None
        for words, call in (
            (
                "query must be the same in all",
                lambda: ring_attention(query[:, :, :last], key, value, group),
            ),
            (
                "causal, scale, softcap must be",
                lambda: ring_attention(query, key, value, group, causal=bool(dist.get_rank())),
            ),
        ):
            raises(RuntimeError, words, call)
    finally:
        dist.set_debug_level(dist.DebugLevel.OFF)


@check(2)
def ring_in_a_compiled_function(group: Any) -> None:
    """It need not be in the graph, but the whole has to be right."""

    def around(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(2 * q, k, v, group, causal=True).square() + 1

    parts = [split_sequence(t, 2, group).requires_grad_() for t in inputs()[:3]]
    expected = around(*parts)
    made = torch.compile(around, backend="aot_eager")(*parts)
    torch.testing.assert_close(made, expected)
    grads = (torch.autograd.grad(output.sum(), parts) for output in (made, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@check(2)
def rings_of_other_processes_are_refused(group: Any) -> None:
    alone = GROUPS[1]
    query, key, value = inputs()[:3]
    if dist.get_rank() == 0:
        expected = attention(query, key, value, causal=True)
        torch.testing.assert_close(ring_attention(query, key, value, alone, causal=True), expected)
    else:
        raises(
            ValueError,
            "group must have this process in it",
            lambda: ring_attention(query, key, value, alone),
        )


# --- data parallel -------------------------------------------------------------------------------


class Tagger(nn.Module):
    """A pre-norm Transformer and an LSTM on top of it, of torch's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.lstm = nn.LSTM(16, 12, batch_first=True, bidirectional=True)
        self.norm = nn.RMSNorm(24)
        self.head = nn.Linear(24, 5)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, tokens: Tensor, tags: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.encoder(self.tokens(tokens)))
        return self.loss(self.head(self.norm(hidden)).flatten(0, 1), tags.flatten())


def train(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], group: Any = None
) -> list[Tensor]:
    """The losses of a step on each batch, of which a process takes its rows."""
    # Not Adam: where a gradient is 0 but for rounding, as that of the keys' bias, it makes it 1.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for batch in batches:
        if group is not None:
            rank, size = dist.get_rank(group), dist.get_world_size(group)
            batch = tuple(t.chunk(size)[rank] for t in batch)  # noqa: PLW2901
        loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if group is not None:
            dist.all_reduce(mean, group=group)
            mean /= dist.get_world_size(group)
        losses.append(mean)
    return losses


def tagging() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], list[Tensor], nn.Module]:
    """An accelerated model, batches, and what torch's own makes of both in one process."""
    torch.manual_seed(0)
    plain = Tagger()
    model = fastseq.accelerate(copy.deepcopy(plain), verbose=False)
    assert type(model.lstm) is fastseq.nn.LSTM
    assert type(model.encoder.layers[0]) is fastseq.nn.TransformerEncoderLayer
    batches = [(torch.randint(20, (8, 9)), torch.randint(5, (8, 9))) for _ in range(3)]
    losses = train(plain, batches)
    assert losses[-1] < losses[0]
    return model, batches, losses, plain


def check_same_training(
    losses: list[Tensor], expected: list[Tensor], model: dict[str, Tensor], plain: nn.Module
) -> None:
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-5, atol=0.0)
    parameters = dict(plain.named_parameters())
    assert model.keys() == parameters.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            model[name], parameter, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@check(2, 4)
def ddp_trains_as_one_process(group: Any) -> None:
    model, batches, expected, plain = tagging()
    for backend in ("auto", "cpu"):
        replica = copy.deepcopy(model)
        with fastseq.use_backend(backend):
            parallel = DistributedDataParallel(replica, process_group=group)
            losses = train(parallel, batches, group)
        check_same_training(losses, expected, dict(replica.named_parameters()), plain)


@check(2, 4)
def fsdp_trains_as_one_process(group: Any) -> None:
    model, batches, expected, plain = tagging()
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in model.encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.lstm, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.encoder.layers[0], fastseq.nn.TransformerEncoderLayer)
    losses = train(model, batches, group)
    whole = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    check_same_training(losses, expected, whole, plain)


@check(2)
def accelerated_after_sharding_trains_as_one_process(group: Any) -> None:
    """What ``fully_shard`` left of torch's classes is swapped; what it made its own stays."""
    _, batches, expected, plain = tagging()
    torch.manual_seed(0)
    model = Tagger()
    fully_shard(model.head, mesh=(mesh := DeviceMesh.from_group(group, "cpu")))
    fully_shard(model, mesh=mesh)
    fastseq.accelerate(model, verbose=False)
    assert type(model.lstm) is fastseq.nn.LSTM
    losses = train(model, batches, group)
    whole = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    check_same_training(losses, expected, whole, plain)


# --- tensor parallel -----------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """Attention by :func:`fastseq.functional.attention`, of as many heads as there are rows."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        return self.output(attention(q, k, v, causal=True).transpose(1, 2).flatten(2))


@check(2)
def heads_split_by_the_tensor_parallel_engine(group: Any) -> None:
    torch.manual_seed(0)
    whole = SelfAttention(32, 8)
    split = copy.deepcopy(whole)
    x = torch.randn(2, 7, 32)
    plan = dict.fromkeys(("query", "key", "value"), ColwiseParallel())
    mesh = DeviceMesh.from_group(group, "cpu")
    parallelize_module(split, mesh, {**plan, "output": RowwiseParallel()})
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    made, expected = split(ours), whole(theirs)
    torch.testing.assert_close(made, expected)
    made.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    for name, parameter in split.named_parameters():
        gradient = whole.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient, msg=name)


@check(2)
def heads_of_a_module_split_by_hand(group: Any) -> None:
    """A process has the rows of its heads of the in-projection, and their columns of the other."""
    torch.manual_seed(0)
    heads, width = 4, 32
    whole = fastseq.nn.MultiheadAttention(width, heads, batch_first=True)
    x = torch.randn(2, 7, width)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    expected, _ = whole(x, x, x, key_padding_mask=padding, need_weights=False)
    rank = dist.get_rank(group)
    rows = slice(rank * width // 2, (rank + 1) * width // 2)
    weights = [w[rows] for w in whole.in_proj_weight.chunk(3)]
    biases = [b[rows] for b in whole.in_proj_bias.chunk(3)]
    q, k, v = (
        nn.functional.linear(x, w, b).unflatten(-1, (heads // 2, -1)).transpose(1, 2)
        for w, b in zip(weights, biases, strict=True)
    )
    mine = attention(q, k, v, mask=~padding[:, None, None]).transpose(1, 2).flatten(2)
    output = nn.functional.linear(mine, whole.out_proj.weight[:, rows]).detach()
    dist.all_reduce(output, group=group)
    torch.testing.assert_close(output + whole.out_proj.bias, expected)


# --- running them --------------------------------------------------------------------------------

TIMEOUT = timedelta(seconds=120)


def run(rank: int, path: str, wanted: list[str]) -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)
    store = dist.FileStore(path, WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=TIMEOUT)
    for n in range(1, WORLD + 1):
        GROUPS[n] = dist.new_group(list(range(n)), timeout=TIMEOUT)
    for name in wanted:
        size, function = CHECKS[name]
        if rank < size:
            function(GROUPS[size])
        dist.barrier()
        if rank == 0:
            print(f"passed {name} after {time.perf_counter() - started:.1f} s", flush=True)
    dist.destroy_process_group()


def main(wanted: list[str]) -> None:
    raises(RuntimeError, "group must be a process group", lambda: split_sequence(torch.ones(4), 0))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read by the processes that are started
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (os.path.join(folder, "store"), wanted or list(CHECKS)), WORLD)


if __name__ == "__main__":
    main(sys.argv[1:])
