"""The layout, the build, and what the documents promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastseq.testing import FAMILIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_readme_examples_run_as_shown(number: int) -> None:
    result = run(sys.executable, "-c", EXAMPLES[number])
    assert result.returncode == 0, result.stderr


def test_readme_has_the_examples() -> None:
    assert len(EXAMPLES) >= 3


def test_kernels_is_no_package_of_its_own() -> None:
    """A well-known distribution owns the top-level name ``kernels``: ours must not shadow it."""
    assert (ROOT / "fastseq" / "kernels").is_symlink()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import importlib.util as u; s = u.find_spec('kernels');"
        "assert s is None or s.origin is None, s; import fastseq.kernels.layer_norm"
    )
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr


def test_pure_python_wheel_without_a_compiler(tmp_path: Path) -> None:
    """CXX names nothing that exists: the wheel has no extension, fits every platform, and works."""
    result = run(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"),
        *("-w", str(tmp_path), "."),
        CXX="no-such-compiler",
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "fastseq/kernels/layer_norm.py" in names
    assert not any(name.endswith(".so") or name.startswith("kernels/") for name in names)
    code = (
        "import fastseq, torch; assert 'site' in fastseq.__file__;"
        "assert 'not built' in fastseq.backends()['cpu'];"
        "x = torch.randn(3, 64, requires_grad=True);"
        "fastseq.functional.rms_norm(x, (64,)).sum().backward()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_extension_needs_nothing_newer_than_it_says() -> None:
    """One stable-ABI file: of Python one function, as old as the stable ABI, so that versions which
    nobody could try here import it too; no C++ symbol of torch, none of a CUDA library.
    """
    (extension,) = (ROOT / "fastseq").glob("_C*.so")
    assert extension.name == "_C.abi3.so"
    symbols = run("nm", "-D", "--undefined-only", "-C", str(extension)).stdout
    wanted = re.findall(r" [UwV] (\S+)", symbols)
    assert wanted
    assert not [s for s in wanted if re.match(r"(at|c10|torch)::|cuda[A-Z]", s)]
    assert [s for s in wanted if re.match(r"_?Py", s)] == ["PyModule_Create2"]


def test_every_family_has_its_file_in_every_room() -> None:
    for family in FAMILIES:
        assert f"from . import {family}" in (ROOT / "fastseq/ops/__init__.py").read_text()
        for room in (
            "fastseq/reference/{}.py",
            "fastseq/functional/{}.py",
            "fastseq/nn/{}.py",
            "fastseq/testing/{}.py",
            "kernels/{}.py",
            "csrc/cpu/{}.cpp",
            "benchmarks/ops/{}.py",
            "tests/test_{}.py",
            "tests/codegen/{}.py",
        ):
            assert (ROOT / room.format(family)).exists(), room.format(family)
        assert f"csrc/bindings/{family}.h" in [
            str(p.relative_to(ROOT)) for p in (ROOT / "csrc/bindings").glob("*.h")
        ]


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md", "docs/generated-code.md"])
def test_tables_are_the_committed_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made anew by `python -m benchmarks table --update README.md docs/*.md`."""
    from benchmarks.__main__ import updated

    monkeypatch.chdir(ROOT)
    text = (ROOT / name).read_text()
    assert "<!-- benchmarks: benchmarks/results/" in text
    assert updated(text) == text
