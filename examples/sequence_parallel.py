"""One long text, cut over two processes: ring attention, and everything else as it was.

Each process has its half of the characters. Embedding, Add & Norm, feed-forward and the loss work
on rows, so they run on a part as on the whole; attention alone looks at other rows, and gets the
keys and values of the other process by ``ring_attention``. The loss is a mean: an ``all_reduce``
gives that of the whole, and DistributedDataParallel averages the gradients as always. Memory for a
sequence is that of its part, so R processes train on R times the length.

    python examples/sequence_parallel.py
"""

import os
import statistics
import tempfile
import time
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from _common import as_numbers, console, options, python_reference
from rich.progress import track
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastseq
from fastseq.distributed import ring_attention, split_sequence

WIDTH, HEADS, DEPTH, PROCESSES = 64, 4, 2, 2


class LanguageModel(nn.Module):
    """Pre-norm blocks on any part of a sequence, given its positions and how to attend."""

    def __init__(self, symbols: int, length: int, attend) -> None:
        super().__init__()
        self.attend = attend
        self.tokens, self.positions = nn.Embedding(symbols, WIDTH), nn.Embedding(length, WIDTH)
        self.norms = nn.ModuleList(fastseq.nn.AddLayerNorm(WIDTH) for _ in range(2 * DEPTH + 1))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(DEPTH))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 4 * WIDTH) for _ in range(DEPTH))
        self.down = nn.ModuleList(nn.Linear(4 * WIDTH, WIDTH) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, symbols, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
        """The mean loss of the part, ``[B, L / R]`` each."""
        branch, stream = self.positions(positions), self.tokens(tokens)
        for n in range(DEPTH):
            h, stream = self.norms[2 * n](branch, stream)  # the sum, and its norm, in one pass
            q, k, v = self.qkv[n](h).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            h, stream = self.norms[2 * n + 1](
                self.attend(q, k, v).transpose(1, 2).flatten(2), stream
            )
            branch = self.down[n](F.gelu(self.up[n](h)))
        h, _ = self.norms[-1](branch, stream)
        return fastseq.functional.linear_cross_entropy(h, self.head.weight, targets)


def train(model: nn.Module, texts: list[Tensor], cut) -> tuple[list[float], float]:
    """The losses of a step on each text, cut as this process needs it; median ms of a step."""
    optimizer, losses, times = torch.optim.Adam(model.parameters(), 3e-3), [], []
    for text in track(texts, f"process {dist.get_rank()}", console=console):
        begin = time.perf_counter()
        positions = torch.arange(text.shape[1] - 1)[None]
        loss = model(*(cut(part) for part in (text[:, :-1], text[:, 1:], positions)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
        losses.append(loss.detach())
    return losses, 1e3 * statistics.median(times[1:])


def run(rank: int, folder: str, length: int, steps: int) -> None:
    """What one process does; the first does it all alone, too, before."""
    torch.set_num_threads(1)
    console.quiet = rank > 0
    store = dist.FileStore(os.path.join(folder, "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    text, alphabet = as_numbers(list("\n\n".join(python_reference().values())))
    texts = [text[n * length : (n + 1) * length + 1][None] for n in range(steps)]

    whole = partial(F.scaled_dot_product_attention, is_causal=True)
    in_a_ring = partial(ring_attention, causal=True)

    def model(attend) -> LanguageModel:
        torch.manual_seed(0)
        return LanguageModel(len(alphabet), length, attend)

    if rank == 0:
        expected, alone_ms = train(model(whole), texts, lambda part: part)
    dist.barrier()
    parallel = DistributedDataParallel(model(in_a_ring))
    losses, ms = train(parallel, texts, lambda part: split_sequence(part, 1))
    means = torch.stack(losses)
    dist.all_reduce(means)
    if rank == 0:
        means, expected = means / PROCESSES, torch.stack(expected)
        console.print(f"{length} characters: alone {alone_ms:.0f} ms a step, {PROCESSES} {ms:.0f}")
        console.print(f"loss: from {means[0]:.4f} to {means[-1]:.4f}")
        apart = ((means - expected).abs() / expected).max()
        console.print(f"largest relative difference of the losses: {apart:.1e}")
        assert apart < 1e-3
        assert steps < 10 or means[-1] < means[0] / 1.3
    dist.destroy_process_group()


def main() -> None:
    """Start the processes and wait for them."""
    quick = options(__doc__).quick
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, 256 if quick else 2048, 3 if quick else 30)
        # By fork, as torch is here already; torchrun or spawn do as well, and a GPU needs them.
        mp.start_processes(run, arguments, PROCESSES, start_method="fork")


if __name__ == "__main__":
    main()
