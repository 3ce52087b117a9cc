"""The work of `route.py`, the same for both sides: standard library only, for it runs in the peer's environment too."""

import random
import statistics
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

REQUESTS_PER_WORKER = 4
"""Standing load."""
_PREFIXES = 8
_STANDING_PROMPTS = 32


@dataclass(frozen=True, slots=True)
class RouteCase:
    """One size of the problem."""

    tokens: int
    block_size: int
    workers: int

    def prompt(self, seed: str, *, group: int) -> list[int]:
        """Return a prompt whose first half is that of its group, and the rest of nobody else."""
        shared = self.tokens // 2
        return _draw(f"group {group}", shared) + _draw(seed, self.tokens - shared)

    def prefix(self, group: int) -> list[int]:
        """Return what the prompts of a group share."""
        return _draw(f"group {group}", self.tokens // 2)

    def prefixes_of(self, worker: int) -> Iterator[int]:
        """Yield the groups whose prefix a worker has cached."""
        yield from {worker % _PREFIXES, (worker // _PREFIXES) % _PREFIXES}

    def standing_prompts(self) -> list[list[int]]:
        """Return the prompts of the standing load, taken in turn."""
        return [self.prompt(f"standing {number}", group=number % _PREFIXES) for number in range(_STANDING_PROMPTS)]

    def fresh_prompts(self, seed: str, count: int) -> list[list[int]]:
        """Return prompts that no other seed has."""
        return [self.prompt(f"{seed} {number}", group=number % _PREFIXES) for number in range(count)]


def _draw(seed: str, count: int) -> list[int]:
    tokens = array("H")
    tokens.frombytes(random.Random(seed).randbytes(tokens.itemsize * count))
    return tokens.tolist()


def median_us(act: Callable[[int], object], count: int) -> float:
    """Return the median time of one call; `act` gets the number of the call."""
    return _median_us([_time_ns(act, number) for number in range(count)])


async def median_us_async(act: Callable[[int], Awaitable[object]], count: int) -> float:
    """Return the same of coroutines, one after the other."""
    times_ns = []
    for number in range(count):
        began = time.perf_counter_ns()
        await act(number)
        times_ns.append(time.perf_counter_ns() - began)
    return _median_us(times_ns)


def _time_ns(act: Callable[[int], object], number: int) -> int:
    began = time.perf_counter_ns()
    act(number)
    return time.perf_counter_ns() - began


def _median_us(times_ns: list[int]) -> float:
    return statistics.median(times_ns) / 1000
