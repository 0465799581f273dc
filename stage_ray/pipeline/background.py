"""Tasks that run beside the training loop, whose first error reaches the loop where it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class BackgroundTasks:
    """Unlike `asyncio.TaskGroup`, an error cancels nothing: an update or a save under way is finished first.

    Example:
        tasks = BackgroundTasks()
        tasks.spawn(generate())
        groups = await tasks.unless_failed(buffer.take(step))  # or the error of generate()
        await tasks.cancel()
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    async def unless_failed(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of ``work``, or the error of the first task that failed, before or meanwhile."""
        task = asyncio.ensure_future(work)
        either: list[asyncio.Future[Any]] = [task, self._failure]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            self._failure.result()  # raises the error
        return task.result()

    async def cancel(self) -> None:
        """Cancel the tasks and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._failure.cancel()

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._failure.done():
            self._failure.set_exception(error)
