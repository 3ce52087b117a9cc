"""What every Engine must do: subclass `EngineContract` in a test module and say how to make the engine.

`KvEngineContract`, in a module beside this one, adds what an engine with a KV cache owes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvmesh.core.errors import ConflictError, FixRequestError, NotKnownError, Reason
from kvmesh.core.hashing import local_block_hashes, sequence_hashes, text_tokens
from kvmesh.core.ids import AttemptKey, RequestId
from kvmesh.engines.engine import (
    Engine,
    EngineInfo,
    EngineRequest,
    FinishReason,
    KvEvent,
    Output,
    PoolStats,
    PromptForm,
    Sampling,
)

MAX_STEPS = 10_000
"""A run that takes longer has stopped making progress."""
GREEDY_SEED = 7


@dataclass(slots=True)
class Answer:
    """Everything an engine produced for one request."""

    token_ids: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)

    @property
    def prompt_output(self) -> Output:
        """The one output of the step in which the prompt was computed."""
        (output,) = [output for output in self.outputs if output.prefill_done]
        return output

    @property
    def finish(self) -> FinishReason | None:
        """How it ended."""
        return self.outputs[-1].finish

    @property
    def produced(self) -> int:
        """Tokens or words of output."""
        return len(self.token_ids) + len(self.words)


@dataclass(slots=True)
class Run:
    """What an engine did until it had no more work."""

    answers: dict[AttemptKey, Answer] = field(default_factory=dict)
    kv_events: list[KvEvent] = field(default_factory=list)
    preempted: int = 0
    most_active: int = 0


def attempt(number: int, *, attempt: int = 1) -> AttemptKey:
    """Return the key of request `number`."""
    return AttemptKey(RequestId(f"request-{number}"), attempt)


def prompt_tokens(number: int, count: int, *, vocab_size: int) -> npt.NDArray[np.uint32]:
    """Return `count` tokens that are the same for the same number and share no first block with another's."""
    return np.random.default_rng(number).integers(1, vocab_size, count, dtype=np.uint32)


def token_request(
    info: EngineInfo, number: int, tokens: npt.NDArray[np.uint32], *, max_tokens: int = 4, **changes: Any
) -> EngineRequest:
    """Return request `number` for a TOKENS engine, hashed as its worker would hash it."""
    local = local_block_hashes(
        tokens, info.block_size, lora=changes.get("lora"), cache_namespace=changes.get("cache_namespace")
    )
    request = EngineRequest(
        key=attempt(number),
        sampling=Sampling(max_tokens=max_tokens, temperature=0.0, seed=GREEDY_SEED, ignore_eos=True),
        token_ids=tokens,
        block_hashes=sequence_hashes(local),
        local_hashes=local,
    )
    return replace(request, **changes)


def run_all(engine: Engine) -> Run:
    """Step an engine until it has no work, checking on the way what holds of every step."""
    run = Run(kv_events=list(engine.drain_kv_events()))
    for _ in range(MAX_STEPS):
        if not engine.has_work():
            run.kv_events += engine.drain_kv_events()
            return run
        result = engine.step()
        keys = [output.key for output in result.outputs]
        assert len(set(keys)) == len(keys), "a request has two outputs in one step"
        assert result.duration_s >= 0
        for output in result.outputs:
            answer = run.answers.setdefault(output.key, Answer())
            assert not answer.outputs or answer.finish is None, "a request goes on after its end"
            assert not output.logprobs or len(output.logprobs) == len(output.token_ids), "a token without its logprobs"
            answer.outputs.append(output)
            answer.token_ids += output.token_ids
            answer.words += output.words
        run.kv_events += result.kv_events
        run.preempted += result.preempted
        run.most_active = max(run.most_active, engine.load().active_requests)
    raise AssertionError(f"the engine still has work after {MAX_STEPS} steps: {engine.load()}")


def held(engine: Engine) -> PoolStats:
    """Return what must be back at its baseline when nothing runs; cached blocks may well stay."""
    return replace(engine.pool_stats(), cached_blocks=0)


NOTHING_HELD = PoolStats(used_blocks=0, pinned_blocks=0, pins=0, imports=0)


class EngineContract:
    """The suite for every engine, with a KV cache or without."""

    def make_engine(self, *, total_blocks: int = 64, block_size: int = 4, max_sequences: int = 4) -> Engine:
        """Return a fresh engine; one without a KV cache, or of a fixed block size, ignores what it has to."""
        raise NotImplementedError

    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        """An engine of the defaults of `make_engine`, closed after the test."""
        engine = self.make_engine()
        yield engine
        engine.close()

    def request(self, engine: Engine, number: int, *, prompt: int = 10, **changes: Any) -> EngineRequest:
        """Return request `number` with `prompt` tokens, in a form that the engine reads."""
        if PromptForm.TOKENS in engine.info.accepts:
            tokens = prompt_tokens(number, prompt, vocab_size=engine.info.vocab_size)
            return token_request(engine.info, number, tokens, **changes)
        max_tokens = changes.pop("max_tokens", 4)
        text = " ".join(f"{number}.{index}" for index in range(prompt))
        request = EngineRequest(attempt(number), Sampling(max_tokens=max_tokens, seed=GREEDY_SEED), text=text)
        return replace(request, **changes)

    def test_it_is_an_engine_at_rest_when_made(self, engine: Engine) -> None:
        """Nothing runs, and nothing is held."""
        assert isinstance(engine, Engine)
        assert not engine.has_work()
        assert engine.load().active_requests == engine.load().waiting_requests == 0
        assert engine.load().max_requests == engine.info.max_sequences
        assert held(engine) == NOTHING_HELD

    def test_step_at_rest_does_nothing(self, engine: Engine) -> None:
        """The worker may step once more than needed."""
        result = engine.step()

        assert result.outputs == ()
        assert result.duration_s == 0
        assert result.kv_events == ()

    def test_request_produces_max_tokens_and_ends_with_length(self, engine: Engine) -> None:
        """The last output carries the end; the first one says that the prompt is computed."""
        request = self.request(engine, 1, max_tokens=3)
        engine.submit(request)

        answer = run_all(engine).answers[request.key]

        assert answer.produced == 3
        assert answer.finish is FinishReason.LENGTH
        assert answer.prompt_output.prompt_tokens == self._prompt_tokens(request)
        assert answer.prompt_output.cached_tokens == 0
        assert held(engine) == NOTHING_HELD

    def test_one_token_is_a_whole_request(self, engine: Engine) -> None:
        """Its only output is first and last."""
        request = self.request(engine, 1, max_tokens=1)
        engine.submit(request)

        answer = run_all(engine).answers[request.key]

        assert [output.finish for output in answer.outputs if output.finish] == [FinishReason.LENGTH]
        assert answer.produced == 1
        assert answer.prompt_output.prefill_done

    def test_answer_is_the_same_alone_and_in_a_batch(self, engine: Engine) -> None:
        """Whatever else runs: nobody's output depends on his neighbours."""
        requests = [self.request(engine, number, prompt=5 + 3 * number, max_tokens=4) for number in range(4)]
        alone = {}
        for request in requests:
            engine.submit(request)
            alone[request.key] = run_all(engine).answers[request.key]
        other = self.make_engine()

        for request in requests:
            other.submit(request)
        together = run_all(other).answers
        other.close()

        for request in requests:
            assert together[request.key].token_ids == alone[request.key].token_ids
            assert together[request.key].words == alone[request.key].words

    def test_log_probabilities_are_told_where_they_are_asked_for_and_change_no_token(self, engine: Engine) -> None:
        """One for each token, with the likeliest in its place: greedily drawn, the token is the first of them."""
        asked = self.request(engine, 1)
        engine.submit(asked)
        silent = run_all(engine).answers[asked.key]
        count = 3 if engine.info.has_logprobs else None  # what an engine has not is never asked of it

        engine.submit(replace(asked, key=attempt(2), sampling=replace(asked.sampling, logprobs=count)))
        told = run_all(engine).answers[attempt(2)]

        known = [each for output in told.outputs for each in output.logprobs]
        assert (told.token_ids, told.words) == (silent.token_ids, silent.words)
        assert not any(output.logprobs for output in silent.outputs)
        assert len(known) == (len(told.token_ids) if engine.info.has_logprobs else 0)
        for token, each in zip(told.token_ids, known, strict=False):
            assert len(each.top_token_ids) == len(each.top_logprobs) == 3
            assert list(each.top_logprobs) == sorted(each.top_logprobs, reverse=True)
            assert (token, each.logprob) == (each.top_token_ids[0], each.top_logprobs[0])
            assert each.logprob <= 0

    def test_requests_beyond_the_slots_wait_and_finish(self, engine: Engine) -> None:
        """No more than max_sequences run at once."""
        count = engine.info.max_sequences * 2 + 1
        for number in range(count):
            engine.submit(self.request(engine, number, max_tokens=2))
        waiting = engine.load().waiting_requests

        run = run_all(engine)

        assert waiting == count
        assert len(run.answers) == count
        assert all(answer.finish is FinishReason.LENGTH for answer in run.answers.values())
        assert 0 < run.most_active <= engine.info.max_sequences
        assert held(engine) == NOTHING_HELD

    def test_load_counts_running_and_waiting(self, engine: Engine) -> None:
        """The figures are those after the last step."""
        count = engine.info.max_sequences + 1
        for number in range(count):
            engine.submit(self.request(engine, number, max_tokens=4))
        engine.step()

        load = engine.load()

        assert load.active_requests + load.waiting_requests == count
        assert 1 <= load.active_requests <= engine.info.max_sequences

    def test_key_that_is_here_is_refused_and_the_first_goes_on(self, engine: Engine) -> None:
        """Nothing of the second is taken in."""
        engine.submit(self.request(engine, 1, max_tokens=3))

        with pytest.raises(ConflictError) as caught:
            engine.submit(self.request(engine, 1, max_tokens=2))
        run = run_all(engine)

        assert caught.value.reason is Reason.ALREADY_EXISTS
        assert run.answers[attempt(1)].produced == 3

    def test_key_is_free_again_after_its_end(self, engine: Engine) -> None:
        """Finished or cancelled."""
        engine.submit(self.request(engine, 1))
        first = run_all(engine).answers[attempt(1)]
        engine.submit(self.request(engine, 1))
        engine.cancel(attempt(1))
        engine.submit(self.request(engine, 1))

        again = run_all(engine).answers[attempt(1)]

        assert (again.token_ids, again.words) == (first.token_ids, first.words)

    def test_attempts_of_one_request_do_not_meet(self, engine: Engine) -> None:
        """The key is the pair."""
        engine.submit(self.request(engine, 1))
        engine.submit(self.request(engine, 1, key=attempt(1, attempt=2)))

        assert set(run_all(engine).answers) == {attempt(1), attempt(1, attempt=2)}

    def test_empty_prompt_is_refused(self, engine: Engine) -> None:
        """In the form that the engine reads."""
        request = self.request(engine, 1)
        if request.text is None:
            empty = replace(request, token_ids=np.empty(0, dtype=np.uint32), block_hashes=(), local_hashes=())
        else:
            empty = replace(request, text="")

        with pytest.raises(FixRequestError) as caught:
            engine.submit(empty)

        assert caught.value.reason is Reason.EMPTY_PROMPT
        assert not engine.has_work()

    def test_prompt_of_the_wrong_form_is_refused(self, engine: Engine) -> None:
        """The field that was set is named."""
        request = self.request(engine, 1)
        if request.text is None:
            field_name, wrong = "text", replace(request, token_ids=None, text="hello")
        else:
            field_name, wrong = "token_ids", replace(request, text=None, token_ids=np.ones(3, dtype=np.uint32))

        with pytest.raises(FixRequestError) as caught:
            engine.submit(wrong)

        assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, field_name)
        assert not engine.has_work()

    def test_cancel_frees_everything_and_says_whether_it_was_here(self, engine: Engine) -> None:
        """Waiting or running; the second time it is gone, and so is one that never was."""
        engine.submit(self.request(engine, 1, max_tokens=4))
        engine.step()
        engine.submit(self.request(engine, 2))

        answers = [engine.cancel(attempt(number)) for number in (1, 2, 1, 3)]

        assert answers == [True, True, False, False]
        assert not engine.has_work()
        assert run_all(engine).answers == {}
        assert held(engine) == NOTHING_HELD

    def test_cancel_leaves_the_others_alone(self, engine: Engine) -> None:
        """Their answers are whole."""
        for number in (1, 2, 3):
            engine.submit(self.request(engine, number, max_tokens=4))
        before = engine.step().outputs
        engine.cancel(attempt(2))

        run = run_all(engine)

        assert set(run.answers) == {attempt(1), attempt(3)}
        started = sum(len(output.token_ids) + len(output.words) for output in before if output.key != attempt(2))
        assert started + sum(answer.produced for answer in run.answers.values()) == 8
        assert held(engine) == NOTHING_HELD

    def test_cancel_storm_ends_at_the_baseline(self, engine: Engine) -> None:
        """Requests cancelled at random points, then one that must succeed."""
        rng = np.random.default_rng(1)
        for number in range(60):
            engine.submit(self.request(engine, number, prompt=int(rng.integers(1, 20)), max_tokens=4))
            for _ in range(int(rng.integers(0, 3))):
                engine.step()
            engine.cancel(attempt(int(rng.integers(0, number + 1))))
        for number in range(60):
            engine.cancel(attempt(number))
        baseline = held(engine)
        engine.submit(self.request(engine, 99, max_tokens=2))

        probe = run_all(engine).answers[attempt(99)]

        assert baseline == NOTHING_HELD
        assert probe.finish is FinishReason.LENGTH
        assert held(engine) == NOTHING_HELD

    def test_prefill_only_request_produces_nothing_and_ends_prefilled(self, engine: Engine) -> None:
        """Its pin, if it has one, is the receiver's to give back."""
        request = self.request(engine, 1, prefill_only=True)
        engine.submit(request)

        answer = run_all(engine).answers[request.key]

        assert answer.produced == 0
        assert answer.finish is FinishReason.PREFILLED
        assert answer.prompt_output.prompt_tokens == self._prompt_tokens(request)
        pin = answer.outputs[-1].pin
        if pin is not None:
            engine.unpin(pin.pin_id)
        assert held(engine) == NOTHING_HELD

    def test_empty_pin_is_valid_and_given_back_exactly_once(self, engine: Engine) -> None:
        """Nothing is cached of a sequence of no blocks."""
        pin = engine.pin_prefix(())
        pins = engine.pool_stats().pins
        engine.unpin(pin.pin_id)

        with pytest.raises(NotKnownError):
            engine.unpin(pin.pin_id)

        assert pin.block_ids == pin.block_hashes == ()
        assert pins == 1
        assert held(engine) == NOTHING_HELD

    def test_import_that_is_not_open_is_not_known(self, engine: Engine) -> None:
        """Neither to be committed nor to be aborted."""
        with pytest.raises(NotKnownError):
            engine.commit_import(123, block_hashes=(), local_hashes=())
        with pytest.raises(NotKnownError):
            engine.abort_import(123)

    def test_memory_has_the_shape_that_the_layout_says(self, engine: Engine) -> None:
        """An engine with no layout has no memory to show."""
        memory, layout = engine.kv_memory(), engine.info.layout

        assert (memory is None) == (layout is None)
        if memory is not None and layout is not None:
            assert memory.shape == (engine.info.total_blocks, layout.bytes_per_block)
            assert memory.dtype == np.uint8
            assert layout.block_size == engine.info.block_size

    @staticmethod
    def _prompt_tokens(request: EngineRequest) -> int:
        if request.token_ids is not None:
            return len(request.token_ids)
        return len(text_tokens(request.text or ""))
