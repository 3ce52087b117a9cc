"""Messages as vLLM publishes them: the oracle hears them over ZeroMQ, we decode the same bytes, and both know the same.

The engine of these programs stores no block twice and evicts the last blocks of its chains first. What the two sides
make of other engines is shown at the end; README.md has the reasons.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from kvmesh.core.foreign_blocks import ForeignBlocks, Refusal
from kvmesh.core.ids import WorkerId, WorkerRank
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored
from kvmesh.core.prefix_index import PrefixIndex
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.services.vllm_events import decode_batch

Ask = Callable[[str, list[Any]], list[Any]]
Path = tuple[int, ...]
"""Contents of blocks, from the first on."""
Prompt = tuple[str | None, list[int]]
"""Adapter and tokens."""

PROGRAMS, MESSAGES = 48, 40
BLOCK_SIZE = 4
WORKER = WorkerRank(WorkerId("1"))
ADAPTERS = (None, None, "adapter")


@dataclass
class Engine:
    """Writes what one engine publishes, and keeps what it holds."""

    rng: random.Random
    held: dict[tuple[str | None, Path], int] = field(default_factory=dict)
    """The engine's own hash of each block, by adapter and path."""

    def messages(self) -> list[bytes]:
        return [self.message() for _ in range(MESSAGES)]

    def message(self) -> bytes:
        events = [event for _ in range(self.rng.randint(1, 4)) if (event := self.event()) is not None]
        return msgpack.packb([self.rng.random() * 1e9, events, self.rng.choice((0, None))])  # type: ignore[no-any-return]  # untyped

    def event(self) -> Any:
        kind = self.rng.choice(("store", "store", "store", "remove", "remove", "strange", "other medium", "clear"))
        if kind == "store":
            return self.store(self.rng.choice(ADAPTERS))
        if kind == "remove":
            return self.remove()
        if kind == "other medium":
            elsewhere = self.stored([self.hash()], None, (1,), None, medium="CPU")
            return self.rng.choice((elsewhere, ["BlockRemoved", list(self.held.values())[:1], "CPU"]))
        if kind == "strange":
            unknown = self.stored([self.hash()], self.hash(), (1,), None)
            return self.rng.choice((unknown, ["BlockRemoved", [self.hash()]]))
        if self.rng.random() < 0.2:
            self.held.clear()
            return self.rng.choice((["AllBlocksCleared"], {"type": "AllBlocksCleared"}))
        return None

    def store(self, adapter: str | None) -> Any:
        path = tuple(self.rng.choices((1, 2, 3), weights=(5, 2, 1), k=self.rng.randint(1, 8)))
        known = next((end for end in range(len(path)) if (adapter, path[: end + 1]) not in self.held), len(path))
        if known == len(path):
            return None
        hashes = [self.hash() for _ in path[known:]]
        parent = self.held[adapter, path[:known]] if known else None
        for at, name in enumerate(hashes, start=known + 1):
            self.held[adapter, path[:at]] = name
        return self.stored(hashes, parent, path[known:], adapter, medium=self.rng.choice((None, "GPU")))

    def stored(
        self,
        hashes: list[Any],
        parent: Any,
        contents: Path,
        adapter: str | None,
        *,
        medium: str | None = None,
    ) -> Any:
        """In the array form or as a map, with or without what newer engines add."""
        event = ["BlockStored", hashes, parent, tokens_of(contents), BLOCK_SIZE, None, medium, adapter]
        if self.rng.random() < 0.5:
            return event if adapter or medium else event[: self.rng.choice((5, 6, 8))]
        names = (
            "type",
            "block_hashes",
            "parent_block_hash",
            "token_ids",
            "block_size",
            "lora_id",
            "medium",
            "lora_name",
        )
        newer = {"extra_keys": None, "group_idx": 0, "kv_cache_spec_kind": "full_attention"}
        return dict(zip(names, event, strict=True)) | (newer if self.rng.random() < 0.5 else {})

    def remove(self) -> Any:
        gone = []
        for _ in range(self.rng.randint(1, 3)):
            leaves = [key for key in self.held if not any(o[0] == key[0] and o[1][:-1] == key[1] for o in self.held)]
            if leaves:
                gone.append(self.held.pop(self.rng.choice(leaves)))
        if not gone:
            return None
        return self.rng.choice(
            (["BlockRemoved", gone], {"type": "BlockRemoved", "block_hashes": gone, "medium": "GPU"})
        )

    def hash(self) -> int:
        return self.rng.choice((self.rng.getrandbits(61), self.rng.getrandbits(64), -self.rng.getrandbits(62)))

    def prompts(self) -> list[Prompt]:
        """Everything it holds and a bit more, and something else."""
        asked = [(adapter, tokens_of((*path, 9))) for adapter, path in self.held]
        return [*asked, *((adapter, tokens_of(path)) for adapter in set(ADAPTERS) for path in ((1, 1, 1), (3,)))]


def tokens_of(contents: Path) -> list[int]:
    return [1_000 * content + place for content in contents for place in range(BLOCK_SIZE)]


def index_of(messages: list[bytes]) -> PrefixIndex:
    """Take messages in as the adapter does."""
    index, blocks = PrefixIndex(), ForeignBlocks(block_size=BLOCK_SIZE)
    for message in messages:
        for event in decode_batch(message, on_ignored=lambda reason: None).events:
            meant = blocks.translate(event)
            if isinstance(meant, BlocksStored):
                index.store(
                    WORKER, parent=meant.parent, block_hashes=meant.block_hashes, local_hashes=meant.local_hashes
                )
            elif isinstance(meant, BlocksRemoved):
                index.remove(WORKER, meant.block_hashes)
            elif meant is not None and not isinstance(meant, Refusal):
                index.clear(WORKER)
    return index


def depths(ask: Ask, programs: list[tuple[list[bytes], list[Prompt]]]) -> list[tuple[list[int], list[int]]]:
    """Return how many leading blocks of each prompt are known after each program: to us, and to the oracle."""
    theirs = ask(
        "engine_events",
        [
            {
                "block_size": BLOCK_SIZE,
                "messages": [message.hex() for message in messages],
                "prompts": [{"token_ids": tokens, "lora_name": adapter} for adapter, tokens in prompts],
            }
            for messages, prompts in programs
        ],
    )
    ours = []
    for messages, prompts in programs:
        index = index_of(messages)
        hashed = [
            PromptBlocks.of_tokens(np.array(tokens, dtype=np.uint32), BLOCK_SIZE, lora=adapter)
            for adapter, tokens in prompts
        ]
        ours.append([index.depth(WORKER, blocks) for blocks in hashed])
    return list(zip(ours, theirs, strict=True))


def test_what_an_engine_publishes_means_the_same_to_both(ask: Ask) -> None:
    engines = [Engine(random.Random(22_00 + number)) for number in range(PROGRAMS)]
    programs = [(engine.messages(), engine.prompts()) for engine in engines]

    found = depths(ask, programs)

    for (messages, prompts), (ours, theirs) in zip(programs, found, strict=True):
        assert ours == theirs, f"{[msgpack.unpackb(message) for message in messages]}: {prompts}"
    assert max(max(theirs) for _, theirs in found) >= 7
    assert sum(len(prompts) for _, prompts in programs) > 20 * PROGRAMS


def test_hashes_that_are_bytes_are_read(ask: Ask) -> None:
    stored = ["BlockStored", [bytes(32), bytes(range(32))], None, tokens_of((1, 2)), BLOCK_SIZE]

    assert depths(ask, [([msgpack.packb([0.0, [stored], 0])], [(None, tokens_of((1, 2)))])]) == [([2], [0])]


def test_a_block_that_an_engine_holds_twice_is_there_until_both_are_gone(ask: Ask) -> None:
    stored, removed = ["BlockStored", [11, 12], None, tokens_of((1, 2)), BLOCK_SIZE], ["BlockRemoved", [12]]
    twice = [msgpack.packb([0.0, [stored, stored, removed], 0])]
    both_gone = [*twice, msgpack.packb([0.0, [removed], 0])]
    prompts: list[Prompt] = [(None, tokens_of((1, 2)))]

    assert depths(ask, [(twice, prompts), (both_gone, prompts)]) == [([2], [1]), ([1], [1])]
