"""The waiting tasks in order, and which of them a worker gets next.

Order: priority, then arrival. Tasks with equal requirements share a line, so a worker's Lease merges the few lines it
can serve and never walks past tasks it cannot do.

Affinity bends the order within the first priority only: of the tasks up to the first one whose skips are used up
(itself included), the one with the deepest cached prefix is picked, the oldest if none is cached. Whoever leases it
charges one skip to each older task that was passed over; so no task is passed over more than `max_skips` times.

A line is a sorted list: O(log n) comparisons and one memmove of 8 bytes per waiting task (some us at 10,000), in
return for exact positions and ordered reading, which a heap does not give.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from kvmesh.core.lease_capability import Capability, WorkerCapability
from kvmesh.core.lease_task import Task


@dataclass(frozen=True, slots=True)
class Pick:
    """The next task for a worker."""

    task: Task
    passed_over: tuple[Task, ...]
    """Older ones of its priority that the worker could have done."""


class WaitingLines:
    """All QUEUED tasks."""

    def __init__(self) -> None:
        self._lines: dict[Capability, list[tuple[int, int]]] = {}
        """(priority, arrival) of the waiting tasks, sorted; no line is empty."""
        self._tasks: dict[int, Task] = {}
        """By arrival."""

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, task: Task) -> bool:
        return self._tasks.get(task.arrival) is task

    def add(self, task: Task) -> None:
        """Put a task in its place."""
        insort(self._lines.setdefault(task.spec.requirement, []), _place(task))
        self._tasks[task.arrival] = task

    def remove(self, task: Task) -> None:
        """Take a waiting task out."""
        line = self._lines[task.spec.requirement]
        del line[bisect_left(line, _place(task))]
        del self._tasks[task.arrival]
        if not line:
            del self._lines[task.spec.requirement]

    def position(self, task: Task) -> int:
        """Count the waiting tasks before this one, in all lines. O(lines x log n)."""
        return sum(bisect_left(line, _place(task)) for line in self._lines.values())

    def pick(
        self, capability: WorkerCapability, *, prefix_depth: Callable[[Task], int] | None, max_skips: int, window: int
    ) -> Pick | None:
        """Choose the next task for a worker, changing nothing; None if it can do none of them.

        `prefix_depth` counts the leading blocks of a task that the worker holds; without it the oldest is chosen.
        It is asked for at most `window` tasks.
        """
        lines = [line for requirement, line in self._lines.items() if capability.meets(requirement)]
        seen: list[Task] = []
        chosen, deepest = 0, 0
        for priority, arrival in islice(heapq.merge(*lines), 1 if prefix_depth is None else window):
            task = self._tasks[arrival]
            if seen and priority != seen[0].spec.priority:
                break
            seen.append(task)
            depth = prefix_depth(task) if prefix_depth is not None else 0
            if depth > deepest:
                chosen, deepest = len(seen) - 1, depth
            if task.skips >= max_skips:
                break
        return Pick(seen[chosen], tuple(seen[:chosen])) if seen else None

    def check_integrity(self) -> None:
        """Assert that lines and tasks agree."""
        places = sorted(place for line in self._lines.values() for place in line)
        assert all(line and line == sorted(line) for line in self._lines.values()), "a line is empty or out of order"
        assert places == sorted(_place(task) for task in self._tasks.values()), "lines and tasks differ"


def _place(task: Task) -> tuple[int, int]:
    return (task.spec.priority, task.arrival)
