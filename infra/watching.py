"""Steps as they happen, on a terminal: who, what, how long, and a bar for the one that is under way."""

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tasks.dispatch import STEPS, StepEvent

MARKS = {"ok": "[green]✓[/green]", "refused": "[yellow]–[/yellow]", "failed": "[red]✗[/red]", "aborted": "[red]✗[/red]"}


class Watcher:
    """Prints each finished step on a line; the current one is a bar at the bottom, where the output is a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
        )
        self._running = self._bar.add_task("starting Prefect", total=None)

    def __enter__(self) -> "Watcher":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, event: StepEvent) -> None:
        title = self._title(event)
        if event.kind == "started":
            self._bar.reset(self._running, description=title, total=None)
        elif event.kind == "progress":
            self._bar.update(
                self._running, description=f"{title} {escape(event.detail)}", total=1.0, completed=event.fraction
            )
        else:
            seconds = f"{event.seconds:6.1f} s"
            self._console.print(f"{MARKS.get(event.kind, ' ')} {seconds}  {title}  [dim]{escape(event.detail)}[/dim]")

    @staticmethod
    def _title(event: StepEvent) -> str:
        number = f"round {event.round_number}" if event.round_number else ""
        return f"{STEPS[event.step].module} {event.step:<24} {event.actor:<10} {number:<9}"
