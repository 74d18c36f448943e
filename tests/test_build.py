"""What setup.py compiles again, and what it does not."""

from __future__ import annotations

import os
import runpy
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

from fastseq import _extension
from fastseq.ops._op import extension_op

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
def test_only_what_changed_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setenv("FASTSEQ_CPP", "1")
    build = runpy.run_path(str(ROOT / "setup.py"))["BuildExtension"]
    folder = tmp_path / "a folder"  # whose name is two words in what the compiler lists
    folder.mkdir()
    source, header, output = tmp_path / "x.cpp", tmp_path / "x.h", folder / "x.o"
    source.write_text('#include "x.h"\n')
    header.write_text("int x;\n")
    for path in (source, header):
        os.utime(path, (1, 1))
    runs = []

    def save_while_compiling() -> None:
        header.write_text("long x;\n")

    def compiled(*flags: str, meanwhile: Callable[[], object] = lambda: None) -> bool:
        runs.clear()

        def run_tool(command: list[str]) -> None:
            runs.append(command)
            build.run_tool(SimpleNamespace(verbose=False), command)
            time.sleep(0.02)  # a file system's clock is that coarse
            meanwhile()

        builder = SimpleNamespace(run_tool=run_tool)
        build.compile(builder, ["g++", *flags, "-c", str(source)], output)
        return bool(runs)

    assert compiled()
    assert not compiled()
    assert compiled("-O1")  # other flags
    assert not compiled("-O1")
    output.with_suffix(".d").unlink()
    assert compiled("-O1")
    header.write_text("int x, y;\n")
    assert compiled("-O1", meanwhile=save_while_compiling)
    assert compiled("-O1")  # what was saved after the compiler had read it
    assert not compiled("-O1")
    header.write_text("an error")
    with pytest.raises(SystemExit, match="build failed"):
        compiled("-O1")
    header.write_text("int x;\n")
    os.utime(header, (1, 1))
    assert compiled("-O1")  # the object of before the error is not taken for this one's
    header.unlink()
    with pytest.raises(SystemExit, match="No such file"):
        compiled("-O1")


@pytest.mark.skipif(_extension.UNAVAILABLE is not None, reason="needs the extension")
def test_a_build_for_this_machine_has_what_it_would_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setenv("FASTSEQ_NATIVE", "1")
    built = runpy.run_path(str(ROOT / "setup.py"))["INSTRUCTION_SETS"]
    assert list(built) == [_extension.cpu_instruction_set()]


@pytest.mark.skipif(_extension.UNAVAILABLE is not None, reason="needs the extension")
def test_an_extension_of_yesterday_says_what_to_do() -> None:
    with pytest.raises(ImportError, match=r"older than .* no op_of_tomorrow\. Build it again"):
        extension_op("op_of_tomorrow")
