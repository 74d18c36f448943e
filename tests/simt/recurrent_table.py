"""The table of docs/recurrent-kernels.md, from the plan; ``python tests/simt/recurrent_table.py``
writes it anew."""

from __future__ import annotations

from pathlib import Path

import torch

from fastseq.ops.recurrent import persistent_plan

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "recurrent-kernels.md"
BEGIN, END = "<!-- plans -->\n", "<!-- end of plans -->\n"
H200 = (132, 232448, 16)
GIGAHERTZ = 1.755
BATCH = 16
HEAD = (
    "| cell | H | pass | exchange | blocks x units | strands | splits | weights in a block: "
    "registers + shared, KiB | shared in all, KiB | barriers | issue | shared memory | step, us |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def row(cell: str, dtype: torch.dtype, hidden: int, backward: bool) -> str:
    plan = persistent_plan(cell, dtype, BATCH, hidden, backward, chip=H200)
    name = (
        f"| {cell.upper()} {str(dtype)[6:]} | {hidden} | {'backward' if backward else 'forward'} "
    )
    if "rejected" in plan:
        return f"{name}| none: {plan['rejected']} |{' |' * 9}\n"
    held, weights = int(plan["held_bytes"]), int(plan["weight_bytes"])
    grid = plan["exchange"] == "grid"
    barriers = 4 if grid else 1 + (plan["splits"] != "1")
    beside = {"block": "", "cluster": " + count", "grid": " + flag"}[plan["exchange"]]
    shared = plan["partners"] != "1"
    cells = (
        f"grid, by {plan['partners']}" if shared else plan["exchange"],
        f"{plan['blocks']} x {plan['units']}",
        plan["strands"],
        plan["splits"],
        f"{held / 1024:.0f} + {(weights - held) / 1024:.0f}",
        f"{int(plan['shared_bytes']) / 1024:.0f}",
        f"{barriers}{beside}{' + count' if shared else ''}",
        plan["issue_cycles"],
        plan["shared_cycles"],
        f"{int(plan['step_cycles']) / GIGAHERTZ / 1000:.2f}",
    )
    return name + "".join(f"| {cell} " for cell in cells) + "|\n"


def table() -> str:
    rows = [
        row(cell, dtype, hidden, backward)
        for cell in ("lstm", "gru")
        for dtype in (torch.bfloat16, torch.float32)
        for hidden in (64, 128, 192, 256, 512, 640, 1024, 1792)
        for backward in (False, True)
    ]
    return HEAD + "".join(rows)


def main() -> None:
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(before + BEGIN + table() + END + after)


if __name__ == "__main__":
    main()
