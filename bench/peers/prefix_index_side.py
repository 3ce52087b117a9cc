"""One side of bench/prefix_index.py, in a process of its own: fills an index, asks it, and prints one JSON object.

    python prefix_index_side.py ours|dynamo --workers 64 --pairs 100000 --seed 1 [--churn-minutes 10]

Needs nothing but the index it measures, so that the peer's environment can run it. The work depends on the seed alone;
`answers` is a digest of what was found, to be equal on both sides.
"""

import argparse
import contextlib
import ctypes
import gc
import hashlib
import json
import os
import random
import resource
import statistics
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

EVENT_BLOCKS = 64
QUERY_BLOCKS = 512
_DEPTHS = [QUERY_BLOCKS * step // 8 for step in range(1, 9)]
_SHARED_BLOCKS = 128
_BATCH_EVENTS = 16
"""Events are made in batches outside of the measured time, and forgotten before the next."""


class Stored(NamedTuple):
    """Blocks that a worker has stored."""

    worker: int
    parent: int | None
    hashes: list[int]
    local: list[int]


class Index(Protocol):
    """What both sides can do."""

    def encode(self, event: Stored) -> Any:
        """Return the event as the index takes it."""

    def apply(self, encoded: Any) -> None:
        """Take an event in."""

    def sync(self) -> None:
        """Wait until all of it shows."""

    def prepare(self, local: list[int]) -> Callable[[], Any]:
        """Return the call that matches a prompt never seen before, given by local hashes."""

    def depths(self, answer: Any) -> list[int]:
        """Return what a match found, sorted."""


class OurIndex:
    """kvmesh.core.prefix_index."""

    def __init__(self, workers: int) -> None:
        """Start empty."""
        from kvmesh.core.ids import WorkerId, WorkerRank  # noqa: PLC0415  # the peer's environment has none of it
        from kvmesh.core.prefix_index import PrefixIndex  # noqa: PLC0415
        from kvmesh.core.prompt_blocks import PromptBlocks  # noqa: PLC0415

        self.ranks = [WorkerRank(WorkerId(f"node-{number}/decode/0")) for number in range(workers)]
        self.index: Any = PrefixIndex()
        self._blocks_of: Any = PromptBlocks.of_local

    def encode(self, event: Stored) -> Stored:
        """Return it as it is."""
        return event

    def apply(self, event: Stored) -> None:
        """Store its blocks."""
        worker, parent, hashes, local = event
        self.index.store(self.ranks[worker], parent=parent, block_hashes=hashes, local_hashes=local)

    def sync(self) -> None:
        """Do nothing: it shows at once."""

    def prepare(self, local: list[int]) -> Callable[[], list[tuple[int, int]]]:
        """Return the call that makes the keys of a prompt and matches it."""
        blocks, match = self._blocks_of(local, 16), self.index.match_masks
        return lambda: match(blocks)

    def depths(self, answer: list[tuple[int, int]]) -> list[int]:
        """Return what a match found, sorted."""
        return sorted(depth for mask, depth in answer for _ in range(mask.bit_count()))


class DynamoIndex:
    """The RadixTree of ai-dynamo-runtime; its events are JSON, and it applies them in a thread of its own."""

    def __init__(self, workers: int) -> None:
        """Start empty."""
        os.environ.setdefault("DYN_LOG", "error")
        from dynamo import _core  # noqa: PLC0415  # ours has no dynamo

        self._tree: Any = _core.RadixTree()
        self._event_id = 0

    def encode(self, event: Stored) -> tuple[int, bytes]:
        """Return the worker and the event as JSON."""
        blocks = [{"block_hash": key, "tokens_hash": own} for key, own in zip(event.hashes, event.local, strict=True)]
        self._event_id += 1
        data = {"stored": {"parent_hash": event.parent, "blocks": blocks}}
        body = {"event_id": self._event_id, "data": data, "dp_rank": 0}
        return event.worker, json.dumps(body, separators=(",", ":")).encode()

    def apply(self, encoded: tuple[int, bytes]) -> None:
        """Hand it to the tree's thread."""
        self._tree.apply_event(*encoded)

    def sync(self) -> None:
        """Ask for something: answers come after the events before them."""
        self._tree.find_matches([])

    def prepare(self, local: list[int]) -> Callable[[], Any]:
        """Return the call that matches a prompt."""
        find = self._tree.find_matches
        return lambda: find(local)

    def depths(self, answer: Any) -> list[int]:
        """Return what a match found, sorted."""
        return sorted(answer.scores.values())


def main() -> None:
    """Measure one side and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["ours", "dynamo"])
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lookups", type=int, default=2000)
    parser.add_argument("--churn-minutes", type=float, default=0.0, help="ours alone")
    given = parser.parse_args()
    if given.churn_minutes:
        print(json.dumps(churn(OurIndex(given.workers), given)))
        return
    index: Index = OurIndex(given.workers) if given.side == "ours" else DynamoIndex(given.workers)
    work = Work(given.seed, given.workers)
    figures = fill(index, work, given.pairs)
    answers = hashlib.sha256()
    for name, queries in work.queries(index):
        figures[name] = ask(index, queries, given.lookups, answers)
    if isinstance(index, OurIndex):
        figures["search_us"] = search(index, work.deep, given.lookups)
    print(json.dumps({**figures, "answers": answers.hexdigest()[:16]}))


class Work:
    """Sequences of 64 to 384 blocks that are all distinct, each on one worker, and some prompts to ask for."""

    def __init__(self, seed: int, workers: int) -> None:
        """Begin with the first sequence."""
        self._rng = random.Random(seed)
        self._workers = workers
        self._next_worker = 0
        self.deep = self.hashes(QUERY_BLOCKS)

    def hashes(self, count: int) -> list[int]:
        """Return random u64."""
        return array("Q", self._rng.randbytes(8 * count)).tolist()

    def sequence(self, worker: int | None = None) -> Iterator[Stored]:
        """Yield the events of a new sequence, of the next worker if none is given."""
        if worker is None:
            worker = self._next_worker
            self._next_worker = (worker + 1) % self._workers
        count = self._rng.randint(64, 384)
        return events(worker, self.hashes(count), self.hashes(count))

    def queries(self, index: Index) -> Iterator[tuple[str, list[list[int]]]]:
        """Store prompts that many workers hold, and yield what to ask for."""
        names = self.hashes(QUERY_BLOCKS)
        for worker in range(self._workers):
            depth = _DEPTHS[worker % len(_DEPTHS)]
            for event in events(worker, names[:depth], self.deep[:depth]):
                index.apply(index.encode(event))
        index.sync()
        yield "match_us", [self.deep]
        start = self.deep[:_SHARED_BLOCKS]
        yield "match_shared_us", [start[: _DEPTHS[0]] + self.hashes(QUERY_BLOCKS - _DEPTHS[0]) for _ in range(32)]
        yield "match_cold_us", [self.hashes(QUERY_BLOCKS) for _ in range(32)]


def events(worker: int, hashes: list[int], local: list[int]) -> Iterator[Stored]:
    """Yield the events of one sequence."""
    for at in range(0, len(hashes), EVENT_BLOCKS):
        stop = at + EVENT_BLOCKS
        yield Stored(worker, hashes[at - 1] if at else None, hashes[at:stop], local[at:stop])


def fill(index: Index, work: Work, pairs: int) -> dict[str, float]:
    """Store until the index has so many pairs; seconds are those of CPU, of all threads, memory what the process grew.

    One short sequence goes in first, so that neither side's one-time costs are counted.
    """
    for event in work.sequence():
        index.apply(index.encode(event))
    index.sync()
    before = rss()
    held = 0
    spent_s = 0.0
    while held < pairs:
        batch: list[Any] = []
        while held < pairs and len(batch) < _BATCH_EVENTS:
            for event in work.sequence():
                held += len(event.hashes)
                batch.append(index.encode(event))
        started = time.process_time()
        for encoded in batch:
            index.apply(encoded)
        index.sync()
        spent_s += time.process_time() - started
    del batch, encoded
    return {"bytes_per_pair": (rss() - before) / held, "blocks_per_s": held / spent_s}


def ask(index: Index, queries: list[list[int]], lookups: int, answers: Any) -> float:
    """Return the median time of one match of a prompt the index has not been asked for in this form, in us."""
    calls = [index.prepare(queries[number % len(queries)]) for number in range(lookups)]
    for call in calls[: len(queries)]:
        answers.update(repr(index.depths(call())).encode())
    calls = [index.prepare(queries[number % len(queries)]) for number in range(lookups)]
    return median_us(calls)


def search(index: OurIndex, local: list[int], lookups: int) -> float:
    """Return the same without the making of keys, which ours does once per prompt: several indexes may be asked."""
    call = index.prepare(local)
    return median_us([call] * lookups)


def median_us(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median time of a call."""
    spent_ns = []
    for call in calls:
        started = time.perf_counter_ns()
        call()
        spent_ns.append(time.perf_counter_ns() - started)
    return statistics.median(spent_ns) / 1000


def churn(ours: OurIndex, given: argparse.Namespace) -> dict[str, float]:
    """Fill the index, then replace the oldest sequences by new ones, and whole workers now and then."""
    work = Work(given.seed, given.workers)
    held: list[deque[array[int]]] = [deque() for _ in ours.ranks]
    pairs = [0] * len(ours.ranks)

    def store(worker: int) -> None:
        hashes = array("Q")
        for event in work.sequence(worker):
            ours.apply(event)
            hashes.extend(event.hashes)
        held[worker].append(hashes)
        pairs[worker] += len(hashes)

    share = given.pairs // given.workers
    for worker in range(given.workers):
        while pairs[worker] < share:
            store(worker)
    filled = peak = rss()
    settled = 0
    rng = random.Random(given.seed)
    churn_s = given.churn_minutes * 60
    started = time.monotonic()
    look_at = replaced = restarts = 0
    while (spent := time.monotonic() - started) < churn_s:
        worker = rng.randrange(given.workers)
        if spent >= churn_s / 8 * (restarts + 1):
            ours.index.remove_worker(ours.ranks[worker].worker_id)
            held[worker].clear()
            pairs[worker] = 0
            restarts += 1
        while pairs[worker] >= share:
            oldest = held[worker].popleft()
            pairs[worker] -= len(oldest)
            replaced += len(oldest)
            assert ours.index.remove(ours.ranks[worker], oldest.tolist()[::-1]) == len(oldest)
        while pairs[worker] < share:
            store(worker)
        if spent >= look_at:
            look_at += 5
            current = resident_bytes()
            peak = max(peak, current)
            settled = max(settled, current) if spent < churn_s / 4 else settled
            print(f"{spent:5.0f} s: {replaced:,} blocks replaced, {current / 2**20:,.0f} MiB", file=sys.stderr)
    stats = ours.index.stats
    assert stats.pairs == sum(pairs), (stats.pairs, sum(pairs))
    return {
        "replaced_blocks": replaced,
        "restarts": restarts,
        "filled_rss_mib": filled / 2**20,
        "settled_rss_mib": settled / 2**20,
        "peak_rss_mib": peak / 2**20,
        "kernel_peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "peak_over_filled": peak / filled,
        "peak_over_settled": peak / settled,
    }


def rss() -> int:
    """Return the memory of this process, with what the allocator only keeps given back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident_bytes()


def resident_bytes() -> int:
    """Return the memory of this process as it is."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
