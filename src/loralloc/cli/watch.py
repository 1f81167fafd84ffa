"""What `loralloc compare` shows while it runs: a live table in a terminal, elsewhere a line for every run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from loralloc.cli.estimate import roughly
from loralloc.cli.progress import clock, console
from loralloc.compare.grid import Cell
from loralloc.compare.results import Row
from loralloc.compare.study import Watcher

STATES = ("waiting", "running", "finished", "failed")


class Lines(Watcher):
    """Tells how many runs there are, how each has ended, and how long the rest will take."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.groups: dict[str, str] = {}
        self._begun, self._due, self._ended = clock(), 0, 0

    def planned(self, cells: Sequence[Cell], kept: Sequence[Cell]) -> None:
        """Say how many runs there are."""
        names = {cell.name for cell in kept}
        for cell in cells:
            self.groups[cell.name] = f"{cell.point.label}, {cell.contender.label}"
            self.states[cell.name] = "finished" if cell.name in names else "waiting"
        self._begun, self._due, self._ended = clock(), len(cells) - len(kept), 0
        told = f", {len(kept):,} of them run before" if kept else ""
        self.say(f"{len(cells):,} runs{told}")

    def started(self, name: str) -> None:
        """Note that a run has begun."""
        self.states[name] = "running"

    def ended(self, name: str, row: Row, seconds: float) -> None:
        """Say how a run has ended."""
        self.states[name] = "finished" if row.finished else "failed"
        self._ended += 1
        found = f"validation loss {row.validation['loss']:.4f}" if row.finished else f"failed: {row.reason}"
        self.say(f"{self._ended:,}/{self._due:,}  {name}  {found}  {roughly(seconds)}{self.rest()}")

    def rest(self) -> str:
        """The estimated time left; empty before the first run has ended and after the last one."""
        left = self._due - self._ended
        if not left or not self._ended:
            return ""
        return f", {roughly((clock() - self._begun) / self._ended * left)} left"

    def say(self, line: str) -> None:
        """Print a line."""
        console.print(f"  {escape(line)}", soft_wrap=True)
        console.file.flush()  # the buffer of a file would delay it


class LiveTable(Lines):
    """A table of all contenders that changes while they run; runs that fail are told above it."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self._live, self._last = live, ""

    def planned(self, cells: Sequence[Cell], kept: Sequence[Cell]) -> None:
        """Show the table."""
        super().planned(cells, kept)
        self.show()

    def started(self, name: str) -> None:
        """Show that a run has begun."""
        super().started(name)
        self.show()

    def ended(self, name: str, row: Row, seconds: float) -> None:
        """Show that a run has ended, and say why one has failed."""
        super().ended(name, row, seconds)
        if not row.finished:
            console.print(f"  [yellow]{escape(name)}[/]: {escape(row.reason)}", soft_wrap=True)
        self.show()

    def say(self, line: str) -> None:
        """Keep the newest line, which stands below the table."""
        self._last = line

    def show(self) -> None:
        """Draw the table."""
        table = Table(box=None, pad_edge=False)
        table.add_column("")
        for state in STATES:
            table.add_column(state, justify="right")
        counts: dict[str, Counter[str]] = {}
        for name, state in self.states.items():
            counts.setdefault(self.groups[name], Counter())[state] += 1
        for group, found in counts.items():
            table.add_row(escape(group), *(str(found[state] or "") for state in STATES))
        self._live.update(Group(table, Text(self._last)))


@contextmanager
def watching() -> Iterator[Watcher]:
    """Yield the display of a comparison."""
    if not console.is_terminal:
        yield Lines()
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield LiveTable(live)
