"""docs/drop-in.md runs from top to bottom and prints what it says."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "drop-in.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", PAGE, flags=re.DOTALL)


def test_every_block_of_the_page_runs_and_prints_what_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("transformers")
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # where its classes are found
    assert len(BLOCKS) == PAGE.count("```python") >= 7
    for code, expected in BLOCKS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/drop-in.md", "exec"), vars(page))
        if expected:
            assert printed.getvalue() == expected
