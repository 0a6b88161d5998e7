"""Progress, from inside a notebook's kernel to the terminal of whoever waits.

A bar that is drawn in a kernel ends up as noise in the notebook's output. So long computations call `note`,
which writes to a file, and the runner's board shows what it says.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

NOTE_VARIABLE = "CLIPSHIFT_PROGRESS"
"""The environment variable that names the file; the runner sets it, and kernels inherit it."""


def note(text: str) -> None:
    """Show a short line ("images 128 of 512") beside the bar of the running notebook; no runner, no line."""
    path = os.environ.get(NOTE_VARIABLE)
    if path:
        Path(path).write_text(text, encoding="utf-8")


@contextmanager
def board(console: Console, note_path: Path) -> Iterator["Board"]:
    """A board for the length of one run; notes are read from `note_path`."""
    note_path.unlink(missing_ok=True)
    os.environ[NOTE_VARIABLE] = str(note_path)
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("cell {task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        _Note(note_path),
    )
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            yield Board(console, progress)
    finally:
        del os.environ[NOTE_VARIABLE]
        note_path.unlink(missing_ok=True)


class Board:
    """Live bars on a terminal, plain lines where the output goes to a file; and where the run is just now."""

    def __init__(self, console: Console, progress: Progress):
        self.console, self.progress = console, progress
        self.source = ""
        """The code cell that runs, or ran last."""
        self.index = self.total = 0
        """Its number among the code cells, from 1, and how many there are."""

    def skipped(self, name: str) -> None:
        self.console.print(f"{name}  up to date", highlight=False)

    def start(self, name: str, total: int) -> None:
        self.name, self.index, self.total, self.source = name, 0, total, ""
        self.began = time.monotonic()
        self.task = self.progress.add_task(name, total=total)

    def cell(self, cell, cell_index: int) -> None:
        """Called by nbclient before each cell, prose included."""
        if cell.cell_type == "code":
            self.index, self.source = self.index + 1, cell.source
            self.progress.update(self.task, completed=self.index - 1)
            self._line(f"cell {self.index}/{self.total}")

    def done(self) -> None:
        self.progress.update(self.task, completed=self.total)
        self._line("done")

    def _line(self, what: str) -> None:
        if not self.console.is_terminal:
            elapsed = time.monotonic() - self.began
            self.console.print(f"{self.name}  {what}  {elapsed:.1f} s", highlight=False, markup=False)


class _Note(ProgressColumn):
    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def render(self, task) -> Text:
        running = not task.finished and self.path.exists()
        return Text(self.path.read_text(encoding="utf-8", errors="replace")[-60:] if running else "")
