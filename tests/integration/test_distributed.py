"""Ring attention, data and tensor parallelism: four processes, started once, run all checks."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from .distributed_checks import CHECKS

ROOT = Path(__file__).parents[2]


@cache
def report() -> tuple[str, str]:
    """What the processes print, and their errors: they stop at the first check that fails."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("distributed_checks.py"))],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    return result.stdout, result.stderr


@pytest.mark.parametrize("name", CHECKS)
def test_processes(name):
    output, errors = report()
    if f"passed {name} " not in output:
        pytest.fail(f"{output}\n{errors}", pytrace=False)
