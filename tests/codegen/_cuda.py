"""The CUDA files whose kernels are compiled and measured; ``python tests/codegen/_cuda.py`` records
the figures of this nvcc in ``recorded/cuda.json``, beside those of others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks import _nvcc  # noqa: E402
from benchmarks._sass import Usage  # noqa: E402

FILES = [name for names in _nvcc.FAMILIES.values() for name in names]
RECORDED = HERE / "recorded" / "cuda.json"


def usages(name: str, arch: str) -> dict[str, Usage]:
    """Of every kernel in a file, in the largest blocks it may have."""
    codes = _nvcc.report(_nvcc.source(name), arch)
    return {
        title: code.usage(title, code.threads, code.shared_bytes) for title, code in codes.items()
    }


def figures(usage: Usage) -> list[int]:
    """What is recorded: registers, accesses of 16 bytes, instructions of the hottest loop."""
    return [usage.registers, usage.wide_loads, usage.wide_stores, usage.loop.instructions]


def recorded() -> dict[str, list[int]]:
    """This nvcc's, by "sm_90a layer_norm: forward_kernel<...>"."""
    return json.loads(RECORDED.read_text()).get(_nvcc.release(), {}) if RECORDED.exists() else {}


def main() -> None:
    versions = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    versions[_nvcc.release()] = {
        f"{arch} {name}: {title}": figures(usage)
        for name in FILES
        for arch in _nvcc.ARCHITECTURES.values()
        for title, usage in usages(name, arch).items()
    }
    blocks = [
        f"  {json.dumps(version)}: {{\n"
        + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items())
        + "\n  }"
        for version, values in sorted(versions.items())
    ]
    RECORDED.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    main()
