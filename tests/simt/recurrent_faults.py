"""The persistent kernels with one of their orderings taken out, to see that the tests notice.

A copy of the sources lies in the build folder; in it every place of ``FAULTS`` does something else
when the program is told so. One compilation, of one pair of kernels, serves them all.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from simt import host

#: What is wrong -> the header, what stands there and what stands there instead; SKIP is true when
#: this fault is asked for.
FAULTS: dict[str, tuple[str, str, str]] = {
    "no barrier between steps": (
        "kernel",
        "if (!is_grid || !goes_on) __syncthreads();",
        "if ((!is_grid || !goes_on) && !SKIP) __syncthreads();",
    ),
    "no wait for the others' state": (
        "kernel",
        "if (n > 0) wait_for_state",
        "if (n > 0 && !SKIP) wait_for_state",
    ),
    "splits add up too early": (
        "kernel",
        "  __syncthreads();\n  if (place.split > 0) return;",
        "  if (!SKIP) __syncthreads();\n  if (place.split > 0) return;",
    ),
    "one buffer of the state": (
        "kernel",
        "(n % 2) * plan.layout",
        "(SKIP ? 0 : n % 2) * plan.layout",
    ),
    "a grid's state is written over": (
        "kernel",
        "if (plan.layout.next_state == 0)",
        "if (plan.layout.next_state == 0 && !SKIP)",
    ),
    "a grid's strand forgets what it kept": (
        "kernel",
        "kept) { mine = kept; }",
        "kept) { if (!SKIP) mine = kept; }",
    ),
    "a grid's strands have one place": (
        "kernel",
        "strand * plan.layout.strand",
        "(SKIP ? 0 : strand) * plan.layout.strand",
    ),
    "the other direction's tensors": (
        "kernel",
        "directions.of[place.direction]",
        "directions.of[SKIP ? 0 : place.direction]",
    ),
    "the first state before zeros": (
        "kernel",
        "  __syncthreads();\n  for (int s",
        "  if (!SKIP) __syncthreads();\n  for (int s",
    ),
    "no barrier before the first step": (
        "kernel",
        "    cluster_barrier();",
        "if (!SKIP) cluster_barrier();",
    ),
    "input before it has come": (
        "kernel",
        "copy_wait<1>();\n      if (is_grid",
        "if (!SKIP) copy_wait<1>();\n      if (is_grid",
    ),
    "a warp sends what it has not written": (
        "group",
        "  __syncwarp();",
        "  if (!SKIP) __syncwarp();",
    ),
    "no wait for a grid": ("kernel", "grid_wait(", "if (!SKIP) grid_wait("),
    "a grid's state is not fetched": (
        "kernel",
        "fetch_state(plan,",
        "if (!SKIP) fetch_state(plan,",
    ),
    "one buffer of a grid's state": (
        "group",
        "2 * int64_t{place.group} + n % 2",
        "2 * int64_t{place.group} + (SKIP ? 0 : n % 2)",
    ),
    "fewer bytes expected": (
        "group",
        "(plan.sharers - 1) * kRows * row_bytes",
        "(plan.sharers - 1) * kRows * row_bytes - (SKIP ? 16 : 0)",
    ),
    "one stage of results": (
        "forward",
        "n % 2 * plan.layout.output_bytes",
        "(SKIP ? 0 : n % 2) * plan.layout.output_bytes",
    ),
    "two stages of input": ("forward", "n % kInputStages *", "n % (SKIP ? 2 : kInputStages) *"),
    "partners' sums before they have come": (
        "kernel",
        "  transfer_wait(count, ",
        "  if (!SKIP) transfer_wait(count, ",
    ),
    "fewer bytes expected of partners' sums": (
        "group",
        "plan.own_tiles * matrices * 512)",
        "plan.own_tiles * matrices * 512 - (SKIP ? 16 : 0))",
    ),
    "partners' sums in one place": (
        "kernel",
        "share > owner ? share - 1 : share",
        "SKIP ? 0 : share > owner ? share - 1 : share",
    ),
    "another partner's part of the state": (
        "group",
        "first = share_of(plan) * part",
        "first = (SKIP ? 0 : share_of(plan)) * part",
    ),
    "an index one too far": (
        "forward",
        "(place.tile * kOctets + octet) * 8",
        "(place.tile * kOctets + octet) * 8 + (SKIP ? 1 : 0)",
    ),
}

_KERNELS = """
#include "device.cu"
#include "recurrent_device.cu"
#include "recurrent_backward.cuh"
#include "recurrent_forward.cuh"
#include "recurrent_kernel.cuh"
namespace fastseq { int fault = -1; }
namespace fastseq::recurrent {
ForwardKernel lstm_forward_kernel(Arithmetic, int strands) {
  return strands == 1 ? &persistent_kernel<Forward<Cell::lstm, Arithmetic::bf16, 1>>
                      : &persistent_kernel<Forward<Cell::lstm, Arithmetic::bf16, 2>>;
}
BackwardKernel lstm_backward_kernel(Arithmetic, int strands) {
  return strands == 1 ? &persistent_kernel<Backward<Cell::lstm, Arithmetic::bf16, 1>>
                      : &persistent_kernel<Backward<Cell::lstm, Arithmetic::bf16, 2>>;
}
ForwardKernel gru_forward_kernel(Arithmetic, int) { return nullptr; }
ForwardKernel rnn_forward_kernel(Arithmetic, int) { return nullptr; }
BackwardKernel gru_backward_kernel(Arithmetic, int) { return nullptr; }
BackwardKernel rnn_backward_kernel(Arithmetic, int) { return nullptr; }
}  // namespace fastseq::recurrent
"""


def build() -> Path:
    """The program: LSTM in bf16, and ``fault``, which chooses one."""
    folder = host.BUILD / "faults"
    cuda = folder / "csrc" / "cuda"
    for part in ("cuda", "math"):
        shutil.copytree(host.ROOT / "csrc" / part, folder / "csrc" / part, dirs_exist_ok=True)
    for header in ("recurrent.h", "types.h"):
        shutil.copy(host.ROOT / "csrc" / header, folder / "csrc")
    for number, (header, before, after) in enumerate(FAULTS.values()):
        path = cuda / f"recurrent_{header}.cuh"
        text = path.read_text()
        assert before in text, f"{path.name} has no {before!r} (any more)"
        path.write_text(
            text.replace(before, after.replace("SKIP", f"(::fastseq::fault == {number})"))
        )
    declared = cuda / "mma.cuh"
    declared.write_text(
        declared.read_text().replace(
            "#pragma once", "#pragma once\nnamespace fastseq { extern int fault; }"
        )
    )
    kernels = cuda / "faulty_kernels.cu"
    kernels.write_text(_KERNELS)
    launcher = (cuda / "recurrent.cu").rename(cuda / "faulty_launcher.cu")
    server = folder / "csrc" / "cuda" / "faulty_server.cpp"
    text = (host.HERE / "recurrent_server.cpp").read_text()
    text = text.replace("../../csrc/cuda/recurrent.h", "recurrent.h")
    for header in ("server.h", "simt.h"):
        text = text.replace(f'"{header}"', f'"{host.HERE / header}"')
    text = text.replace(
        "namespace simt {", "namespace fastseq { extern int fault; }\nnamespace simt {", 1
    )
    choose = 'functions["fault"] = [](Request& request) -> const char* {\n'
    choose += "    fastseq::fault = static_cast<int>(request.integer());\n    return nullptr;\n  };"
    text = text.replace('functions["plan"] = plan;', f'functions["plan"] = plan;\n  {choose}')
    server.write_text(text)
    host.PROGRAMS["recurrent_faults"] = [server, kernels, launcher]
    return host.build("recurrent_faults")
