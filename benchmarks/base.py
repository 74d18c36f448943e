"""``--base REV``: another commit built and measured beside this one, operator by operator in turn.

Each tree runs in processes of its own, and what is compared is the speedup over torch that each
found in its own interleaved run: a machine that is slow for a while is slow for torch too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


class BaseError(Exception):
    """The other commit cannot be had or built; the message says why."""


def checkout(revision: str) -> Path:
    """A built tree of a commit below ``build/base``; made once."""
    found = _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    tree = _ROOT / "build" / "base" / found[:12]
    if not (tree / "setup.py").exists():
        _git("worktree", "add", "--detach", str(tree), found)
    if not (tree / "built").exists():
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        built = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        if built.returncode:
            raise BaseError(f"--base {revision} does not build: {built.stderr[-2000:]}")
        (tree / "built").touch()
    return tree


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BaseError(f"git {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout.strip()


def measure(
    revision: str, operators: list[str], options: list[str], out: Path
) -> tuple[Path, Path]:
    """Both results, as folders below ``out``: the other commit's, and this tree's.

    Args:
        revision: anything git takes for a commit.
        operators: measured in turn, first there, then here.
        options: of ``python -m benchmarks``, but for --base, --ops and --out.
        out: the folder for both.
    """
    trees = {"base": checkout(revision), "this": _ROOT}
    folders = {name: (out / name).resolve() for name in trees}
    for operator in operators:
        for name, tree in trees.items():
            command = [sys.executable, "-m", "benchmarks", "--ops", operator, *options]
            command += ["--resume", "--out", str(folders[name])]
            environment = {**os.environ, "PYTHONPATH": str(tree)}
            code = subprocess.run(command, cwd=tree, env=environment, check=False).returncode
            if code > 1:
                print(f"--base: {operator} cannot be measured in {tree}", file=sys.stderr)
    return folders["base"], folders["this"]
