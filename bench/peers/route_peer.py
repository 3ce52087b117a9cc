"""The other side of `route.py`: Dynamo's radix tree and its SelectionService, driven over stdin and stdout.

A line in: {"case": {...}} sets a case up, {"round": NAME, "calls": COUNT} measures it once; a line of JSON comes back.
Its workers' event endpoints publish nothing, so the index behind `select` is empty: it has less to do than ours.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DYN_LOG", "off")
sys.path.insert(0, str(Path(__file__).parent))

from dynamo._core import RadixTree, SelectionService, compute_block_hash_for_seq
from route_work import REQUESTS_PER_WORKER, RouteCase, median_us, median_us_async

_MODEL = "m"


class Peer:
    """One case, set up."""

    def __init__(self, case: RouteCase) -> None:
        """Make an index in which workers hold prefixes, and a service without workers yet."""
        self._case = case
        self._tree = RadixTree()
        self._service = SelectionService(indexer_threads=4)
        for worker in range(case.workers):
            for number, group in enumerate(case.prefixes_of(worker)):
                hashes = compute_block_hash_for_seq(case.prefix(group), case.block_size)
                blocks = [{"block_hash": group << 32 | at, "tokens_hash": value} for at, value in enumerate(hashes)]
                stored = {"event_id": number, "data": {"stored": {"parent_hash": None, "blocks": blocks}}, "dp_rank": 0}
                self._tree.apply_event(worker, json.dumps(stored).encode())

    async def fill(self) -> None:
        """Register the workers and give them their standing load."""
        for worker in range(self._case.workers):
            await self._service.upsert_worker(
                {
                    "worker_id": worker + 1,
                    "model_name": _MODEL,
                    "block_size": self._case.block_size,
                    "endpoint": f"http://127.0.0.1:{20000 + worker}",
                    "kv_events_endpoints": {0: f"tcp://127.0.0.1:{30000 + worker}"},
                    "total_kv_blocks": 1_000_000,
                    "max_num_batched_tokens": 8192,
                }
            )
        prompts = self._case.standing_prompts()
        for number in range(self._case.workers * REQUESTS_PER_WORKER):
            await self._book(f"standing {number}", prompts[number % len(prompts)])

    async def measure(self, round_name: str, calls: int) -> dict[str, float]:
        """Return the medians of one round."""
        size = self._case.block_size
        matched = self._case.fresh_prompts(f"{round_name} match", calls)
        hash_match = median_us(
            lambda number: self._tree.find_matches(compute_block_hash_for_seq(matched[number], size)), calls
        )
        selected = self._case.fresh_prompts(f"{round_name} select", calls)
        select = await median_us_async(
            lambda number: self._service.select({"model_name": _MODEL, "token_ids": selected[number]}), calls
        )
        booked = self._case.fresh_prompts(f"{round_name} book", calls)

        async def book(number: int) -> None:
            name = f"{round_name} {number}"
            await self._book(name, booked[number])
            await self._service.prefill_complete(name)
            await self._service.free_reservation(name)

        return {
            "hash_match": hash_match,
            "select": select,
            "reserve_complete_release": await median_us_async(book, calls),
        }

    def close(self) -> None:
        """Stop its threads."""
        self._service.shutdown()

    async def _book(self, name: str, tokens: list[int]) -> None:
        await self._service.select_and_reserve({"model_name": _MODEL, "selection_id": name, "token_ids": tokens})


async def main() -> None:
    """Answer until stdin ends."""
    peer: Peer | None = None
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        answer: dict[str, float] = {}
        if "case" in asked:
            if peer is not None:
                peer.close()
            peer = Peer(RouteCase(**asked["case"]))
            await peer.fill()
        elif peer is not None:
            answer = await peer.measure(asked["round"], asked["calls"])
        print(json.dumps(answer), flush=True)


asyncio.run(main())
