"""What every Engine with a KV cache must do, on top of `EngineContract`."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from kvmesh.core.errors import BackOffError, FixRequestError, NotKnownError, Reason, TryElsewhereError
from kvmesh.core.hashing import sequence_hashes
from kvmesh.core.ids import SequenceHash
from kvmesh.engines.engine import (
    BlocksRemoved,
    BlocksStored,
    CacheCleared,
    Engine,
    EngineRequest,
    FinishReason,
    Import,
    KvEvent,
    Pin,
)
from kvmesh.testing.engine_contract import (
    NOTHING_HELD,
    EngineContract,
    attempt,
    held,
    prompt_tokens,
    run_all,
    token_request,
)


class ReplayedCache:
    """The prefix cache as the events alone tell it; every event is checked against the laws of `core.kv_events`."""

    def __init__(self) -> None:
        """Start empty."""
        self.parents: dict[SequenceHash, SequenceHash | None] = {}
        self.removed = 0

    def apply(self, events: Iterable[KvEvent]) -> None:
        """Follow the events, in order."""
        for event in events:
            match event:
                case BlocksStored(parent, block_hashes, local_hashes):
                    assert block_hashes, "an event that stores nothing"
                    assert len(block_hashes) == len(local_hashes)
                    for block_hash in block_hashes:
                        assert parent is None or parent in self.parents, "stored under a parent that is not cached"
                        assert block_hash not in self.parents, "stored twice"
                        self.parents[block_hash] = parent
                        parent = block_hash
                case BlocksRemoved(block_hashes):
                    for block_hash in block_hashes:
                        assert block_hash in self.parents, "removed, and not cached"
                        del self.parents[block_hash]
                        assert block_hash not in self.parents.values(), "removed before a block that follows it"
                        self.removed += 1
                case CacheCleared():
                    self.parents.clear()

    def depth(self, block_hashes: Iterable[SequenceHash]) -> int:
        """Count the leading blocks that are cached."""
        count = 0
        for block_hash in block_hashes:
            if block_hash not in self.parents:
                break
            count += 1
        return count


class KvEngineContract(EngineContract):
    """The suite for engines with a KV cache; `make_engine` honours all of its arguments."""

    verifies_imports = True
    """The engine can tell that imported blocks are not what was asked for."""

    @pytest.mark.parametrize("extra", [-1, 0, 1])
    def test_repeated_prompt_comes_from_the_cache_but_for_one_token_at_least(self, engine: Engine, extra: int) -> None:
        """The cap is (prompt_tokens - 1) // block_size blocks."""
        size = engine.info.block_size
        prompt = 3 * size + extra
        engine.submit(self.request(engine, 1, prompt=prompt))
        first = run_all(engine).answers[attempt(1)]
        engine.submit(self.request(engine, 1, prompt=prompt))

        again = run_all(engine).answers[attempt(1)]

        assert first.prompt_output.cached_tokens == 0
        assert again.prompt_output.cached_tokens == (3 * size if extra > 0 else 2 * size)
        assert again.token_ids == first.token_ids

    def test_only_the_common_prefix_is_reused(self, engine: Engine) -> None:
        """Blocks after the first difference are others, even where their tokens are the same."""
        size = engine.info.block_size
        tokens = prompt_tokens(1, 4 * size + 1, vocab_size=engine.info.vocab_size)
        changed = tokens.copy()
        changed[2 * size] = 0
        engine.submit(token_request(engine.info, 1, tokens))
        run_all(engine)
        engine.submit(token_request(engine.info, 2, changed))

        assert run_all(engine).answers[attempt(2)].prompt_output.cached_tokens == 2 * size

    def test_hit_rate_counts_cached_tokens_over_prompt_tokens(self, engine: Engine) -> None:
        """Since the start."""
        size = engine.info.block_size
        for number in (1, 2):
            engine.submit(replace(self.request(engine, 1, prompt=2 * size + 1, max_tokens=1), key=attempt(number)))
            run_all(engine)

        assert engine.load().prefix_hit_rate == pytest.approx(2 * size / (2 * (2 * size + 1)))

    def test_blocks_that_output_fills_are_cached_too(self, engine: Engine) -> None:
        """The next turn of a conversation finds the last answer; only its last token has no KV yet."""
        size = engine.info.block_size
        prompt = prompt_tokens(1, size + 1, vocab_size=engine.info.vocab_size)
        engine.submit(token_request(engine.info, 1, prompt, max_tokens=2 * size, lora="l", cache_namespace="n"))
        answer = run_all(engine).answers[attempt(1)]
        conversation = np.concatenate((prompt, np.array([*answer.token_ids, 0, 0], dtype=np.uint32)))
        next_turn = token_request(engine.info, 2, conversation, lora="l", cache_namespace="n")
        plain = token_request(engine.info, 3, conversation)

        assert engine.cached_blocks(next_turn.block_hashes) == 3
        assert engine.cached_blocks(plain.block_hashes) == 0

    def test_active_blocks_are_those_held(self, engine: Engine) -> None:
        """Cached-only blocks do not count."""
        size = engine.info.block_size
        engine.submit(self.request(engine, 1, prompt=2 * size + 1, max_tokens=3))
        engine.step()
        running = engine.load()
        run_all(engine)
        resting = engine.load()

        assert running.active_blocks == 3
        assert running.cache_usage == pytest.approx(3 / engine.info.total_blocks)
        assert resting.active_blocks == resting.cache_usage == 0
        assert engine.pool_stats().cached_blocks == 2

    def test_prefill_only_pins_the_full_blocks_that_may_be_reused(self, engine: Engine) -> None:
        """[0, (prompt_tokens - 1) // block_size), held until given back."""
        request = self.request(engine, 1, prompt=3 * engine.info.block_size, prefill_only=True)
        pin = self._prefill(engine, request)
        while_pinned = engine.pool_stats()
        engine.unpin(pin.pin_id)

        assert pin.block_hashes == request.block_hashes[:2]
        assert len(set(pin.block_ids)) == 2
        assert (while_pinned.pins, while_pinned.pinned_blocks, while_pinned.used_blocks) == (1, 2, 2)
        assert held(engine) == NOTHING_HELD

    def test_prefill_only_prompt_without_a_full_block_ends_with_an_empty_pin(self, engine: Engine) -> None:
        """There is nothing to hand over, and that is no error."""
        pin = self._prefill(engine, self.request(engine, 1, prompt=engine.info.block_size, prefill_only=True))

        assert pin.block_ids == ()
        engine.unpin(pin.pin_id)
        assert held(engine) == NOTHING_HELD

    def test_pinned_prefix_outlives_pressure_and_unpinned_does_not(self) -> None:
        """A pool twice filled over evicts everything but what is pinned."""
        engine = self.make_engine(total_blocks=16)
        size = engine.info.block_size
        kept, dropped = (self.request(engine, number, prompt=2 * size + 1, max_tokens=1) for number in (1, 2))
        for request in (kept, dropped):
            engine.submit(request)
            run_all(engine)
        pin = engine.pin_prefix(kept.block_hashes)
        self._fill(engine, numbers=range(10, 20))
        under_pressure = engine.cached_blocks(kept.block_hashes), engine.cached_blocks(dropped.block_hashes)
        engine.unpin(pin.pin_id)
        self._fill(engine, numbers=range(20, 30))

        assert under_pressure == (2, 0)
        assert engine.cached_blocks(kept.block_hashes) == 0
        engine.close()

    def test_two_pins_of_one_prefix_are_two_holds(self, engine: Engine) -> None:
        """Each is given back for itself."""
        request = self.request(engine, 1, prompt=2 * engine.info.block_size + 1)
        engine.submit(request)
        run_all(engine)
        one, two = (engine.pin_prefix(request.block_hashes) for _ in range(2))
        engine.unpin(one.pin_id)
        stats = engine.pool_stats()
        engine.unpin(two.pin_id)

        assert one.block_ids == two.block_ids
        assert (stats.pins, stats.pinned_blocks, stats.used_blocks) == (1, 2, 2)
        assert held(engine) == NOTHING_HELD

    def test_request_waits_for_an_unpin_without_spinning(self) -> None:
        """There is no work while only an unpin can help; then there is."""
        engine = self.make_engine(total_blocks=8)
        size = engine.info.block_size
        pin = self._prefill(engine, self.request(engine, 1, prompt=6 * size + 1, prefill_only=True))
        engine.submit(self.request(engine, 2, prompt=4 * size, max_tokens=1))
        while_pinned = engine.has_work(), engine.load().waiting_requests
        engine.unpin(pin.pin_id)

        assert while_pinned == (False, 1)
        assert run_all(engine).answers[attempt(2)].finish is FinishReason.LENGTH
        assert held(engine) == NOTHING_HELD
        engine.close()

    def test_full_pool_preempts_and_every_answer_is_still_the_same(self) -> None:
        """What was produced before is neither lost nor told again."""
        roomy, tight = self.make_engine(total_blocks=64), self.make_engine(total_blocks=10)
        size = roomy.info.block_size
        expected, found = (self._long_answers(engine, prompt=size, output=4 * size) for engine in (roomy, tight))

        assert found[0] == expected[0]
        assert expected[1] == 0
        assert found[1] > 0
        assert held(tight) == NOTHING_HELD
        roomy.close()
        tight.close()

    @pytest.mark.parametrize("seed", range(4))
    def test_events_replay_to_exactly_what_is_cached(self, seed: int) -> None:
        """Leaf-first eviction, parents before children, nothing twice: checked at every event of a random run."""
        engine = self.make_engine(total_blocks=16, max_sequences=3)
        rng = np.random.default_rng(seed)
        cache = ReplayedCache()
        requests: list[EngineRequest] = []
        pins: list[Pin] = []
        for number in range(80):
            request = self._branch(engine, number, rng)
            requests.append(request)
            engine.submit(request)
            if rng.random() < 0.2:
                engine.cancel(attempt(int(rng.integers(0, number + 1))))
            if rng.random() < 0.2:
                pins.append(engine.pin_prefix(request.block_hashes))
            if len(pins) > 2:
                engine.unpin(pins.pop(0).pin_id)
            cache.apply(engine.drain_kv_events())
            for _ in range(int(rng.integers(0, 6))):
                if engine.has_work():
                    cache.apply(engine.step().kv_events)
            assert len(cache.parents) == engine.pool_stats().cached_blocks
            assert all(
                cache.depth(known.block_hashes) == engine.cached_blocks(known.block_hashes) for known in requests
            )
        for pin in pins:
            engine.unpin(pin.pin_id)
        cache.apply(run_all(engine).kv_events)

        assert cache.removed > 0
        assert len(cache.parents) == engine.pool_stats().cached_blocks > 0
        assert held(engine) == NOTHING_HELD
        engine.close()

    def test_imported_blocks_serve_like_computed_ones(self, engine: Engine) -> None:
        """The prompt's blocks come from another engine, and the answer is the one computed here alone."""
        source = self.make_engine()
        request = self.request(engine, 1, prompt=3 * engine.info.block_size + 1)
        source.submit(request)
        expected = run_all(source).answers[request.key]
        handed_over = source.pin_prefix(request.block_hashes)
        opened = engine.begin_import(request.block_hashes, first_block=0)
        _copy(source, handed_over, engine, opened)
        before = engine.cached_blocks(request.block_hashes), engine.drain_kv_events(), held(engine).imports

        pin = engine.commit_import(
            opened.import_id, block_hashes=request.block_hashes, local_hashes=request.local_hashes
        )
        events = engine.drain_kv_events()
        engine.submit(request)
        answer = run_all(engine).answers[request.key]

        assert before == (0, (), 1)
        assert events == (BlocksStored(None, request.block_hashes, request.local_hashes),)
        assert pin.block_hashes == request.block_hashes
        assert answer.prompt_output.cached_tokens == 3 * engine.info.block_size
        assert answer.token_ids == expected.token_ids
        engine.unpin(pin.pin_id)
        assert held(engine) == NOTHING_HELD
        source.close()

    def test_imported_blocks_are_no_cache_hits_of_the_request_they_are_for(self, engine: Engine) -> None:
        """Its own import is left out of what it found cached; for the next request the same blocks are hits."""
        source = self.make_engine()
        size = engine.info.block_size
        request = self.request(engine, 1, prompt=3 * size + 1, max_tokens=1)
        source.submit(request)
        run_all(source)
        handed_over = source.pin_prefix(request.block_hashes)
        opened = engine.begin_import(request.block_hashes, first_block=0)
        _copy(source, handed_over, engine, opened)
        pin = engine.commit_import(
            opened.import_id, block_hashes=request.block_hashes, local_hashes=request.local_hashes
        )

        engine.submit(replace(request, imported_tokens=3 * size))
        first = run_all(engine).answers[request.key].prompt_output.cached_tokens
        hit_rate = engine.load().prefix_hit_rate
        engine.submit(replace(request, key=attempt(2)))
        second = run_all(engine).answers[attempt(2)].prompt_output.cached_tokens

        assert (first, hit_rate) == (0, 0.0)
        assert second == 3 * size
        engine.unpin(pin.pin_id)
        source.close()

    def test_import_behind_a_cached_prefix_stores_only_the_rest(self, engine: Engine) -> None:
        """The pin that comes back covers both."""
        source = self.make_engine()
        size = engine.info.block_size
        tokens = prompt_tokens(1, 4 * size, vocab_size=engine.info.vocab_size)
        whole, head = token_request(engine.info, 1, tokens), token_request(engine.info, 2, tokens[: 2 * size])
        source.submit(whole)
        run_all(source)
        engine.submit(head)
        run_all(engine)
        prefix = engine.pin_prefix(whole.block_hashes)
        opened = engine.begin_import(whole.block_hashes, first_block=2)
        handed_over = source.pin_prefix(whole.block_hashes)
        _copy(source, replace(handed_over, block_ids=handed_over.block_ids[2:]), engine, opened)

        pin = engine.commit_import(opened.import_id, block_hashes=whole.block_hashes, local_hashes=whole.local_hashes)
        engine.unpin(prefix.pin_id)
        stats = held(engine)
        engine.unpin(pin.pin_id)

        assert len(prefix.block_ids) == len(opened.block_ids) == 2
        assert pin.block_hashes == whole.block_hashes
        assert pin.block_ids[:2] == prefix.block_ids
        assert (stats.used_blocks, stats.pins, stats.imports) == (4, 1, 0)
        assert engine.drain_kv_events() == (
            BlocksStored(whole.block_hashes[1], whole.block_hashes[2:], whole.local_hashes[2:]),
        )
        assert held(engine) == NOTHING_HELD
        source.close()

    def test_aborted_import_leaves_no_trace(self, engine: Engine) -> None:
        """Its blocks are free, and it is known no more."""
        request = self.request(engine, 1, prompt=3 * engine.info.block_size)
        opened = engine.begin_import(request.block_hashes, first_block=0)
        used = held(engine).used_blocks
        engine.abort_import(opened.import_id)

        with pytest.raises(NotKnownError):
            engine.commit_import(opened.import_id, block_hashes=request.block_hashes, local_hashes=request.local_hashes)

        assert used == 3
        assert engine.cached_blocks(request.block_hashes) == 0
        assert engine.drain_kv_events() == ()
        assert held(engine) == NOTHING_HELD

    def test_import_with_bytes_that_never_arrived_is_refused_and_aborted(self, engine: Engine) -> None:
        """No token is produced from KV that was not wholly written."""
        if not self.verifies_imports:
            pytest.skip("this engine cannot tell")
        source = self.make_engine()
        request = self.request(engine, 1, prompt=3 * engine.info.block_size)
        source.submit(request)
        run_all(source)
        opened = engine.begin_import(request.block_hashes, first_block=0)
        _copy(source, source.pin_prefix(request.block_hashes), engine, opened)
        memory = engine.kv_memory()
        assert memory is not None
        memory[opened.block_ids[1]] = 0

        with pytest.raises(TryElsewhereError) as caught:
            engine.commit_import(opened.import_id, block_hashes=request.block_hashes, local_hashes=request.local_hashes)

        assert caught.value.reason is Reason.KV_TRANSFER_FAILED
        assert engine.cached_blocks(request.block_hashes) == 0
        assert held(engine) == NOTHING_HELD
        source.close()

    def test_import_of_another_sequence_than_begun_is_refused_and_aborted(self, engine: Engine) -> None:
        """What was allocated for one prompt does not become another's."""
        begun, other = (self.request(engine, number, prompt=2 * engine.info.block_size) for number in (1, 2))
        opened = engine.begin_import(begun.block_hashes, first_block=0)

        with pytest.raises(TryElsewhereError) as caught:
            engine.commit_import(opened.import_id, block_hashes=other.block_hashes, local_hashes=other.local_hashes)

        assert caught.value.reason is Reason.KV_TRANSFER_FAILED
        assert engine.cached_blocks(other.block_hashes) == 0
        assert held(engine) == NOTHING_HELD

    def test_import_beyond_the_pool_is_refused(self, engine: Engine) -> None:
        """The caller prefills here instead."""
        local = range(1, engine.info.total_blocks + 2)

        with pytest.raises(BackOffError) as caught:
            engine.begin_import(sequence_hashes(local), first_block=0)

        assert caught.value.reason is Reason.OVERLOADED
        assert held(engine) == NOTHING_HELD

    @pytest.mark.parametrize("first_block", [-1, 3])
    def test_import_that_begins_outside_of_its_sequence_is_refused(self, engine: Engine, first_block: int) -> None:
        """The field is named."""
        with pytest.raises(FixRequestError) as caught:
            engine.begin_import(sequence_hashes((1, 2)), first_block=first_block)

        assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "first_block")
        assert held(engine) == NOTHING_HELD

    def _prefill(self, engine: Engine, request: EngineRequest) -> Pin:
        engine.submit(request)
        pin = run_all(engine).answers[request.key].outputs[-1].pin
        assert pin is not None
        return pin

    def _fill(self, engine: Engine, *, numbers: range) -> None:
        for number in numbers:
            engine.submit(self.request(engine, number, prompt=4 * engine.info.block_size, max_tokens=1))
            run_all(engine)

    def _long_answers(self, engine: Engine, *, prompt: int, output: int) -> tuple[dict[int, list[int]], int]:
        for number in range(3):
            engine.submit(self.request(engine, number, prompt=prompt, max_tokens=output))
        run = run_all(engine)
        assert all(answer.produced == output for answer in run.answers.values())
        assert all(answer.prompt_output.prefill_done for answer in run.answers.values())
        return {number: run.answers[attempt(number)].token_ids for number in range(3)}, run.preempted

    def _branch(self, engine: Engine, number: int, rng: np.random.Generator) -> EngineRequest:
        """Return a request whose prompt shares a random part with those of others."""
        size = engine.info.block_size
        tokens = np.repeat(rng.integers(1, 3, size=int(rng.integers(1, 6))), size).astype(np.uint32)
        tail = tokens[: len(tokens) - int(rng.integers(0, size))]
        return token_request(engine.info, number, tail, max_tokens=int(rng.integers(1, 2 * size)))


def _copy(source: Engine, pin: Pin, target: Engine, opened: Import) -> None:
    """Move blocks as a transport would."""
    origin, arrived = source.kv_memory(), target.kv_memory()
    assert origin is not None
    assert arrived is not None
    arrived[list(opened.block_ids)] = origin[list(pin.block_ids)]
