"""What bounds a kernel's hottest loop, from its machine code and the datasheet: no GPU needed.

One pass of the loop takes a multiprocessor, with as many programs at work as it can hold, at least

    issue     instructions * warps / 4                     four schedulers, an instruction a cycle
    special   special functions * threads / 16             exp2, log2, reciprocal
    tensor    flops of the products / flops a cycle        dense, 16 bits
    memory    bytes * threads / bytes a cycle              its share of the chip's bandwidth

cycles, and the largest of them is the bound. Caches, latencies and what happens outside of the loop
are not in it: it says what a kernel cannot beat, not what it reaches.
"""

from __future__ import annotations

from dataclasses import dataclass

from ._sass import Usage


@dataclass(frozen=True)
class Chip:
    """A chip by its datasheet."""

    name: str
    multiprocessors: int
    hertz: float
    bytes_per_second: float
    flops: float  # dense, 16 bits
    shared_bytes: int  # of a multiprocessor


#: By architecture: A100 80 GB SXM, H200 SXM, B200.
CHIPS = {
    80: Chip("A100", 108, 1.41e9, 2.039e12, 312e12, 164 << 10),
    90: Chip("H200", 132, 1.755e9, 4.8e12, 989e12, 228 << 10),
    100: Chip("B200", 148, 1.85e9, 8.0e12, 2250e12, 228 << 10),
}


@dataclass(frozen=True)
class Estimate:
    """Cycles of a multiprocessor for one pass of a program's hottest loop."""

    issue: float
    special: float
    tensor: float
    memory: float

    @property
    def bound(self) -> str:
        """The name of the largest."""
        return max(("issue", "special", "tensor", "memory"), key=lambda name: getattr(self, name))

    @property
    def memory_share(self) -> float:
        """How near to the memory's speed the loop can come: 1 where memory bounds it."""
        return self.memory / max(self.issue, self.special, self.tensor, self.memory)


#: Of a multiprocessor, alike on all of CHIPS: threads, blocks, 32-bit registers.
_THREADS, _BLOCKS, _REGISTERS = 2048, 32, 65536
#: Shared memory that the system takes of each block.
_RESERVED = 1 << 10


def occupancy(usage: Usage, architecture: int) -> float:
    """The part of a multiprocessor's threads that live at once, launched as ``usage`` says."""
    warps = -(-usage.threads // 32)
    registers = -(-max(1, usage.registers) // 8) * 8 * 32 * warps  # allotted by eights
    blocks = min(
        _BLOCKS,
        _THREADS // (32 * warps),
        _REGISTERS // registers,
        CHIPS[architecture].shared_bytes // (usage.shared_bytes + _RESERVED),
    )
    return blocks * 32 * warps / _THREADS


def estimate(usage: Usage, architecture: int) -> Estimate:
    """The cycles that a kernel's loop takes at the least."""
    chip, loop = CHIPS[architecture], usage.loop
    cycles = chip.multiprocessors * chip.hertz
    return Estimate(
        issue=loop.instructions * usage.threads / 32 / 4,
        special=loop.special * usage.threads / 16,
        tensor=loop.tensor_flops / (chip.flops / cycles),
        memory=loop.bytes * usage.threads / (chip.bytes_per_second / cycles),
    )
