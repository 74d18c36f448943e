"""Rich's console, tables and progress bar, or plain ones of the same names where it is missing.

A machine with a GPU and no network has what it has; the numbers must come all the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

try:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        track,
    )
    from rich.table import Table
    from rich.text import Text

except ModuleNotFoundError:

    class Text(str):  # type: ignore[no-redef]
        """A string that has no style."""

        def __new__(cls, text: str = "", style: str = "") -> Text:
            return str.__new__(cls, text)

    class Table:  # type: ignore[no-redef]
        """Columns as wide as what is in them."""

        def __init__(self, title: str = "", **_: Any) -> None:
            self.title, self.rows = title, [[]]

        def add_column(self, name: str, **_: Any) -> None:
            self.rows[0].append(name)

        def add_row(self, *cells: str, **_: Any) -> None:
            self.rows.append([str(cell) for cell in cells])

        def __str__(self) -> str:
            widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
            lines = [
                "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                for row in self.rows
            ]
            return "\n".join([self.title, *(line.rstrip() for line in lines)])

    class Console:  # type: ignore[no-redef]
        """Prints."""

        def __init__(self, stderr: bool = False, **_: Any) -> None:
            self.file = sys.stderr if stderr else sys.stdout

        def print(self, *what: object, **_: Any) -> None:
            print(*what, file=self.file)

    Progress = None  # type: ignore[assignment,misc]

    def track(work: Iterable[Any], *_: Any, **__: Any) -> Iterable[Any]:  # type: ignore[misc]
        return work


@contextmanager
def progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on the terminal; what it yields takes what is being done and how much is done."""
    if Progress is None or not sys.stderr.isatty():
        yield lambda text, done: None
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text, done: bar.update(task, description=text, completed=done)


__all__ = ["Console", "Table", "Text", "progress", "track"]
