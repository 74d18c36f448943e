"""``fastseq demo``: two models trained with torch's modules and with fastseq's, side by side."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import __version__
from ..accelerate import accelerate
from ..backends import backends
from ..explain import SWAPPED, call_name, explain
from ._machine import device_name
from .demo_models import CharGPT, RecurrentLM, Text

#: The third run: torch again, each initial weight moved to the next fp32 number. How far it strays
#: from the first is what a rounding error grows to in this training, and so the yardstick of
#: what fastseq's different rounding may do.
YARDSTICK = "yardstick"
VARIANTS = ("torch", "fastseq", YARDSTICK)
#: fastseq rounds in every layer of every step, the yardstick once, in all weights: one power of ten
#: lies between "rounded elsewhere" and "computes something else". A LayerNorm whose output is off
#: by 0.1 % exceeds the bound at the first step, sixtyfold.
ALLOWED = 10.0
_WARM_UP = 3  # steps whose time is not counted


@dataclass(frozen=True)
class Task:
    """A model to train and how."""

    name: str
    make: Callable[[int], nn.Module]
    batch: int
    context: int
    learning_rate: float


CPU_TASKS = (
    Task("CharGPT", lambda size: CharGPT(size, 128, 2, 4, 80), 32, 80, 4e-3),
    Task("RecurrentLM", lambda size: RecurrentLM(size, 128, 2), 24, 64, 4e-3),
)
GPU_TASKS = (
    Task("CharGPT", lambda size: CharGPT(size, 768, 12, 12, 512), 32, 512, 4e-4),
    Task("RecurrentLM", lambda size: RecurrentLM(size, 1024, 2), 64, 256, 2e-3),
)


@dataclass
class Result:
    """What one task came to; times in milliseconds, memory in MiB."""

    name: str
    parameters: int
    threads: int
    swapped: dict[str, int]
    skipped: list[tuple[str, str, str]]
    kept: dict[str, int]
    kernels: dict[str, list[str]]
    losses: dict[str, list[float]] = field(default_factory=lambda: {v: [] for v in VARIANTS})
    step_ms: dict[str, list[float]] = field(default_factory=lambda: {v: [] for v in VARIANTS})
    swapped_ms: dict[str, float] = field(default_factory=dict)
    memory_mib: dict[str, float] = field(default_factory=dict)
    bound: list[float] = field(default_factory=list)
    sample: str = ""

    @property
    def steps(self) -> int:
        """How many steps each variant made."""
        return len(self.losses["torch"])

    def median_ms(self, variant: str) -> float:
        """The median time of a step, the first few left out."""
        times = self.step_ms[variant]
        return statistics.median(times[_WARM_UP:] or times)

    @property
    def ratio(self) -> float:
        """torch's time of a step over fastseq's: the median of the pairs that ran side by side."""
        pairs = list(zip(self.step_ms["torch"], self.step_ms["fastseq"], strict=True))
        return statistics.median(torchs / ours for torchs, ours in pairs[_WARM_UP:] or pairs)

    def differences(self, variant: str) -> list[float]:
        """How far the variant's loss is from torch's, step by step."""
        pairs = zip(self.losses[variant], self.losses["torch"], strict=True)
        return [abs(a - b) for a, b in pairs]

    @property
    def exceeded(self) -> int | None:
        """The first step at which fastseq's loss is farther from torch's than allowed, or None."""
        pairs = zip(self.differences("fastseq"), self.bound, strict=True)
        # `not <=` rather than `>`: a loss that is not a number exceeds every bound.
        return next((n for n, (off, allowed) in enumerate(pairs, 1) if not off <= allowed), None)


def run(argv: list[str]) -> int:
    """The command: 0 when the losses agree, 1 when they do not, 2 for wrong arguments."""
    options = _parser().parse_args(argv)
    try:
        from . import demo_report
    except ModuleNotFoundError as missing:
        print(f"demo: {missing.name} is missing: pip install 'fastseq[demo]'", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("demo: torch sees no CUDA device (see `fastseq doctor`)", file=sys.stderr)
        return 2
    gpu = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    tasks = GPU_TASKS if gpu else CPU_TASKS
    options.out.mkdir(parents=True, exist_ok=True)

    text = Text.load()
    environment = _environment(device)
    demo_report.print_header(environment, len(text.tokens), len(text.alphabet))
    results = []
    threads = torch.get_num_threads()
    with demo_report.progress() as progress:
        for task in tasks:
            advance = progress(task.name, options.steps or options.seconds)
            if not gpu:
                torch.set_num_threads(options.threads or _best_threads(task, text))
            results.append(_measure(task, text, device, options, advance))
    torch.set_num_threads(threads)

    picture = demo_report.save_picture(results, environment, options.out / "demo.png")
    models = [
        asdict(r) | {"steps": r.steps, "ratio": r.ratio, "agrees": r.exceeded is None}
        for r in results
    ]
    report = {"environment": environment, "allowed": ALLOWED, "models": models}
    numbers = options.out / "demo.json"
    numbers.write_text(json.dumps(report, indent=1) + "\n")
    demo_report.print_results(results)
    print(f"\nPicture: {picture}\nNumbers: {numbers}")
    return 1 if any(result.exceeded for result in results) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastseq demo",
        description="Train a character-level GPT and a recurrent language model on Python's own "
        "documentation, each from the same weights on the same batches: as it is, and after "
        "fastseq.accelerate(model). The two take turns step by step. Fails if their losses differ "
        f"by more than {ALLOWED:g} times what a rounding error in the initial weights comes to.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-results"), metavar="DIR")
    parser.add_argument(
        "--seconds", type=_positive(float), default=22.0, help="training time of each model [22]"
    )
    parser.add_argument(
        "--steps",
        type=_positive(int),
        help="train for so many steps instead, however long it takes",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--threads", type=_positive(int), help="CPU threads; by default what is faster, 1 or all"
    )
    return parser


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = kind(text)
        if not 0 < number < math.inf:
            raise ValueError(text)
        return number

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it in its message
    return parse


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "fastseq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device.type,
        "device_name": device_name(device),
        "precision": "bf16 autocast" if device.type == "cuda" else "fp32",
        "backends": backends(),
    }


# --- one step ------------------------------------------------------------------------------------


class _Trainer:
    """A model with its optimizer, one step at a time."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        self.model = model
        self.learning_rate = learning_rate
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
        self.steps = 0

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, self.steps / 10)
        self.optimizer.zero_grad()
        loss = _loss(self.model, inputs, targets)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    with _precision(inputs.device):
        return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def _precision(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What the function returns, and how many milliseconds it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, (time.perf_counter() - start) * 1e3


# --- what is measured ----------------------------------------------------------------------------


def _measure(
    task: Task,
    text: Text,
    device: torch.device,
    options: argparse.Namespace,
    advance: Callable[[float, str], None],
) -> Result:
    torch.manual_seed(0)
    plain = task.make(len(text.alphabet)).to(device)
    accelerated = accelerate(copy.deepcopy(plain), verbose=False)
    moved = copy.deepcopy(plain)
    with torch.no_grad():
        for weight in moved.parameters():
            up_or_down = torch.full_like(weight, math.inf).copysign(torch.randn_like(weight))
            weight.copy_(torch.nextafter(weight, up_or_down))
    models = dict(zip(VARIANTS, (plain, accelerated, moved), strict=True))
    trainers = {name: _Trainer(model, task.learning_rate) for name, model in models.items()}

    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        inputs, targets = text.batch(task.batch, task.context, generator)
        return inputs.to(device), targets.to(device)

    result = _describe(task, plain, accelerated, batch())
    start = time.perf_counter()
    while True:
        inputs, targets = batch()
        turn = result.steps % len(VARIANTS)  # no variant always comes first
        for name in VARIANTS[turn:] + VARIANTS[:turn]:
            loss, milliseconds = _timed(lambda: trainers[name].step(inputs, targets), device)  # noqa: B023
            result.losses[name].append(float(loss))
            result.step_ms[name].append(milliseconds)
        elapsed = time.perf_counter() - start
        done = result.steps if options.steps else elapsed
        advance(done, f"step {result.steps}, loss {result.losses['fastseq'][-1]:.2f}")
        if done >= (options.steps or options.seconds):
            break

    result.bound = _bound(result, task.batch * task.context, device)
    for name in ("torch", "fastseq"):
        result.memory_mib[name] = _peak_memory(lambda: trainers[name].step(inputs, targets), device)  # noqa: B023
    result.swapped_ms = _time_of_swapped(plain, accelerated, inputs)
    result.sample = _sample(accelerated, text, task.context, device)
    return result


def _describe(
    task: Task, plain: nn.Module, accelerated: nn.Module, batch: tuple[Tensor, Tensor]
) -> Result:
    rows = explain(accelerated).modules
    calls = explain(lambda: _loss(accelerated, *batch).backward())
    accelerated.zero_grad()
    kernels: dict[str, list[str]] = {}
    for call in dict.fromkeys(calls.calls):
        reasons = [f"not {name}: {why}" for name, why in call.reasons]
        kernels[call_name(call.op)] = [call.backend, *reasons]
    return Result(
        name=task.name,
        parameters=sum(weight.numel() for weight in plain.parameters()),
        threads=torch.get_num_threads(),
        swapped=dict(Counter(row.type for row in rows if row.decision == SWAPPED)),
        skipped=[(row.fqn, row.type, row.reason) for row in rows if row.decision != SWAPPED],
        kept=dict(Counter(_torch_modules(plain, {row.fqn for row in rows}))),
        kernels=kernels,
    )


def _torch_modules(model: nn.Module, besides: set[str], prefix: str = "") -> Iterator[str]:
    """The classes of torch's modules that do the rest of the work; not of those inside them."""
    for name, child in model.named_children():
        fqn = prefix + name
        if fqn in besides:
            continue
        torchs = type(child).__module__.startswith("torch.nn.modules")
        if torchs and not isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield type(child).__name__
        else:
            yield from _torch_modules(child, besides, fqn + ".")


def _bound(result: Result, tokens: int, device: torch.device) -> list[float]:
    """How far fastseq's loss may be from torch's at each step.

    ``ALLOWED`` times the farthest that the yardstick has strayed so far (or in the first ten steps,
    since it may be lucky in one), and never less than the loss itself is rounded: a mean over
    tokens, each rounded to the precision of the logits, is good to epsilon / sqrt(tokens).
    """
    logits = torch.bfloat16 if device.type == "cuda" else torch.float32
    epsilon = torch.finfo(torch.float32).eps + torch.finfo(logits).eps / math.sqrt(tokens)
    strayed = result.differences(YARDSTICK)
    farthest = max(strayed[:10])
    bound = []
    for off, loss in zip(strayed, result.losses["torch"], strict=True):
        farthest = max(farthest, off)
        bound.append(ALLOWED * farthest + 4 * epsilon * loss)
    return bound


def _peak_memory(step: Callable[[], Any], device: torch.device) -> float:
    """The most MiB that torch's allocator hands out within a step beyond what it holds before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    from torch.profiler import ProfilerActivity, profile

    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    now = peak = 0
    for _, change in memory:
        now += change
        peak = max(peak, now)
    return peak / 2**20


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps the profiler's C++ log off the screen; it writes to the file descriptor itself."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _time_of_swapped(plain: nn.Module, accelerated: nn.Module, inputs: Tensor) -> dict[str, float]:
    """Milliseconds that one step spends in the swapped modules, with torch's and with fastseq's.

    Each is run by itself, forward and backward, on the arguments that it gets in the model.
    """
    names = [row.fqn for row in explain(accelerated).modules if row.decision == SWAPPED]
    arguments: list[tuple[str, tuple[Any, ...]]] = []
    hooks = [
        plain.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: arguments.append((name, args))
        )
        for name in names
    ]
    with torch.no_grad(), _precision(inputs.device):
        plain(inputs)
    for hook in hooks:
        hook.remove()

    def forward_and_backward(module: nn.Module, args: tuple[Any, ...]) -> None:
        with _precision(inputs.device):
            output = module(*args)
        output = output[0] if isinstance(output, tuple) else output
        output.backward(torch.ones_like(output))

    total = {"torch": 0.0, "fastseq": 0.0}
    for name, args in arguments:
        leaves = tuple(
            arg.detach().requires_grad_()
            if torch.is_tensor(arg) and arg.is_floating_point()
            else arg
            for arg in args
        )
        times: dict[str, list[float]] = {variant: [] for variant in total}
        for _ in range(11):
            for variant, model in zip(total, (plain, accelerated), strict=True):
                module = model.get_submodule(name)
                call = lambda: forward_and_backward(module, leaves)  # noqa: B023, E731
                times[variant].append(_timed(call, inputs.device)[1])
        for variant in total:
            total[variant] += statistics.median(times[variant])
    return total


def _sample(
    model: nn.Module, text: Text, context: int, device: torch.device, length: int = 240
) -> str:
    """What the trained model writes on from "The ", by temperature 0.7 and seed 0."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([[text.alphabet.index(character) for character in "The "]])
    model.eval()
    with torch.no_grad(), _precision(device):
        for _ in range(length):
            logits = model(tokens[:, -context:].to(device))[0, -1].float().cpu()
            probabilities = (logits / 0.7).softmax(dim=-1)
            following = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, following[None]], dim=1)
    model.train()
    return text.write(tokens[0])


def _best_threads(task: Task, text: Text) -> int:
    """One thread or all of them: on a machine that others use too, one is often the faster."""
    most = torch.get_num_threads()
    trainer = _Trainer(task.make(len(text.alphabet)), task.learning_rate)
    batch = text.batch(task.batch, task.context, torch.Generator())
    trainer.step(*batch)
    times = {}
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        trainer.step(*batch)
        steps = [_timed(lambda: trainer.step(*batch), torch.device("cpu"))[1] for _ in range(5)]
        times[threads] = statistics.median(steps)
    torch.set_num_threads(most)
    return min(times, key=times.__getitem__)
