"""What is said while something goes on: a bar, or ten lines where there is none; warnings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from splatedit.editing import Step
    from splatedit.images import ImageStep


@contextmanager
def progress_bar(console: Console, steps: int) -> Iterator[Callable[[Step | ImageStep, float], None]]:
    """A function to call with each Step and the mean seconds per step: a live bar, or ten lines where there is none."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    def words(step: Step | ImageStep, pace: float) -> str:
        return f"loss {step.loss:.3g}  {pace:.2f} s/step"

    def line(step: Step | ImageStep, pace: float) -> None:
        done = step.index + 1
        if done == steps or done % max(steps // 10, 1) == 0:
            console.print(f"step {done}/{steps}  {words(step, pace)}  {(steps - done) * pace:.0f} s left")

    if not console.is_terminal:
        yield line
        return
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console) as bar:
        task = bar.add_task("starting", total=steps)

        def move(step: Step | ImageStep, pace: float) -> None:
            bar.update(task, completed=step.index + 1, description=words(step, pace))

        yield move


def warn(console: Console, line: str) -> None:
    console.print(f"[bold yellow]Warning:[/] {escape(line)}")
