"""The openai_upstream engine in front of a real little server: what it sends, and every way an answer can fail."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvmesh.core.errors import FixRequestError, MeshError, NotKnownError, Reason, TryElsewhereError
from kvmesh.core.ids import SequenceHash
from kvmesh.core.kv_events import BlocksStored, CacheCleared, KvEvent
from kvmesh.engines.engine import EngineRequest, FinishReason, Output, Sampling
from kvmesh.engines.openai_upstream import OpenAiUpstreamEngine
from kvmesh.engines.openai_upstream_options import OpenAiUpstreamOptions
from kvmesh.engines.stream_thread import Publish
from kvmesh.testing.engine_contract import Answer, attempt, run_all
from kvmesh.testing.openai_upstream_server import OpenAiUpstreamServer, Script

BOUND_S = 15.0
STORED = BlocksStored(None, (SequenceHash(1),), (1,))
MakeEngine = Callable[..., OpenAiUpstreamEngine]


@pytest.fixture
def server() -> Iterator[OpenAiUpstreamServer]:
    with OpenAiUpstreamServer() as server:
        yield server


@pytest.fixture
def make_engine(server: OpenAiUpstreamServer) -> Iterator[MakeEngine]:
    made: list[OpenAiUpstreamEngine] = []

    def make(*, api_key: str | None = None, open_events: Any = None, **options: Any) -> OpenAiUpstreamEngine:
        url = options.pop("url", server.url)
        engine = OpenAiUpstreamEngine(
            OpenAiUpstreamOptions(url=url, **options), url=url, api_key=api_key, open_events=open_events
        )
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


def text_request(text: str = "one two three", number: int = 1, **sampling: Any) -> EngineRequest:
    return EngineRequest(attempt(number), Sampling(**{"max_tokens": 3, **sampling}), text=text)


def answer_of(engine: OpenAiUpstreamEngine, request: EngineRequest) -> Answer:
    engine.submit(request)
    return run_all(engine).answers[request.key]


def step_until(engine: OpenAiUpstreamEngine, is_over: Callable[[list[Output]], bool]) -> list[Output]:
    outputs: list[Output] = []
    deadline = time.monotonic() + BOUND_S
    while not is_over(outputs):
        assert time.monotonic() < deadline, outputs
        outputs += engine.step().outputs
    return outputs


def step_until_in_service(engine: OpenAiUpstreamEngine) -> None:
    deadline = time.monotonic() + BOUND_S
    while engine.has_work():
        assert time.monotonic() < deadline, engine.load()
        engine.step()
    assert engine.load().out_of_service == ""


def error_of(answer: Answer) -> str:
    last = answer.outputs[-1]
    assert last.error is not None
    assert last.failure is not None
    assert last.error.startswith(last.failure.reason.value)
    return last.error


def test_a_completion_is_asked_for_as_it_was_sampled(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    engine = make_engine()

    answer_of(engine, text_request("say it", max_tokens=7, temperature=0.25, top_p=0.5, seed=11))

    assert server.requests == [
        {
            "model": "upstream-model", "prompt": "say it", "max_tokens": 7, "temperature": 0.25, "top_p": 0.5,
            "seed": 11, "stream": True, "stream_options": {"include_usage": True},
        }
    ]  # fmt: skip


def test_what_the_api_does_not_have_is_sent_only_where_asked(
    server: OpenAiUpstreamServer, make_engine: MakeEngine
) -> None:
    engine = make_engine()

    answer_of(engine, text_request(top_k=40, ignore_eos=True))
    answer_of(engine, text_request())

    first, second = server.requests
    assert (first["top_k"], first["ignore_eos"]) == (40, True)
    assert second.keys().isdisjoint({"top_k", "ignore_eos", "seed"})


def test_a_chat_is_one_user_message(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    answer = answer_of(make_engine(api="chat"), text_request("Tell me a joke"))

    assert server.requests[0]["messages"] == [{"role": "user", "content": "Tell me a joke"}]
    assert "prompt" not in server.requests[0]
    assert "".join(answer.words) == "Tell me a "


def test_token_prompts_go_as_ids(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    engine = make_engine(prompts="tokens")
    request = EngineRequest(attempt(1), Sampling(max_tokens=2), token_ids=np.array([5, 6, 7], dtype=np.uint32))

    answer = answer_of(engine, request)

    assert server.requests[0]["prompt"] == [5, 6, 7]
    assert answer.words == ["5 ", "6 "]
    assert answer.prompt_output.prompt_tokens == 3


def test_the_key_is_sent_with_every_request(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    answer_of(make_engine(api_key="k3y"), text_request())

    assert [headers["authorization"] for headers in server.request_headers] == ["Bearer k3y", "Bearer k3y"]


def test_the_upstreams_end_is_the_answers_end(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    server.script = Script(words=["all", " said"])
    engine = make_engine()

    whole, cut = answer_of(engine, text_request(max_tokens=5)), answer_of(engine, text_request(max_tokens=1))

    assert (whole.words, whole.finish) == (["all", " said"], FinishReason.STOP)
    assert (cut.words, cut.finish) == (["all"], FinishReason.LENGTH)


def test_usage_of_the_last_chunk_corrects_the_prompts(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    server.script = Script(usage={"prompt_tokens": 6, "prompt_tokens_details": {"cached_tokens": 4}})

    answer = answer_of(make_engine(), text_request("one two three"))

    assert answer.prompt_output.prompt_tokens in (6, len("one two three"))  # whether it all arrives in one step or not
    assert (answer.outputs[-1].prompt_tokens, answer.outputs[-1].cached_tokens) == (6, 4)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(Script(says_done=False), id="no [DONE]"),
        pytest.param(Script(says_finish=False), id="no finish_reason"),
        pytest.param(Script(words=[], says_finish=True), id="no words"),
    ],
)
def test_an_end_is_an_end_however_it_is_said(
    script: Script, server: OpenAiUpstreamServer, make_engine: MakeEngine
) -> None:
    server.script = script

    answer = answer_of(make_engine(), text_request())

    assert answer.outputs[-1].error is None
    assert answer.finish is not None
    assert answer.prompt_output.prefill_done


@pytest.mark.parametrize(
    ("script", "reason", "words"),
    [
        pytest.param(Script(status=400), "INVALID_FIELD", "answered 400: as the test wants it", id="400"),
        pytest.param(Script(status=401), "INTERNAL", "api_key_env", id="401"),
        pytest.param(Script(status=404), "UNKNOWN_MODEL", "answered 404", id="404"),
        pytest.param(Script(status=429, headers={"retry-after": "2"}), "OVERLOADED", "answered 429", id="429"),
        pytest.param(Script(status=500), "WORKER_LOST", "answered 500", id="500"),
        pytest.param(Script(status=503, body=b"starting"), "WORKER_LOST", "answered 503: starting", id="503"),
        pytest.param(Script(cut_after=1), "WORKER_LOST", "broke off", id="cut within the answer"),
        pytest.param(Script(end_after=1), "WORKER_LOST", "ended its stream before the answer did", id="ends too soon"),
        pytest.param(Script(error_after=1), "WORKER_LOST", "as the test wants it", id="an error within the answer"),
        pytest.param(Script(error_after=1, body=b"nonsense"), "WORKER_LOST", "no OpenAI answer", id="nonsense"),
    ],
)
def test_what_the_upstream_does_wrong_fails_that_request_alone(
    script: Script, reason: str, words: str, server: OpenAiUpstreamServer, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    server.script = script
    broken = answer_of(engine, text_request(number=1))
    server.script = Script()

    whole = answer_of(engine, text_request(number=2))

    assert error_of(broken).startswith(f"{reason}: ")
    assert words in error_of(broken)
    assert broken.finish is None
    assert whole.finish is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("hold_after", "options", "words"),
    [
        pytest.param(0, {"first_token_s": 0.2}, "no headers within 0.2 s", id="never begins"),
        pytest.param(1, {"token_gap_s": 0.2}, "no event within 0.2 s", id="stops in the middle"),
    ],
)
def test_silence_ends_with_its_wait(
    hold_after: int, options: dict[str, Any], words: str, server: OpenAiUpstreamServer, make_engine: MakeEngine
) -> None:
    server.script = Script(hold_after=hold_after)

    answer = answer_of(make_engine(**options), text_request())

    assert error_of(answer).startswith("WORKER_LOST: ")
    assert words in error_of(answer)
    server.wait_gone(1)


def test_what_came_before_a_failure_is_handed_over_before_it(
    server: OpenAiUpstreamServer, make_engine: MakeEngine
) -> None:
    server.script = Script(error_after=2)

    answer = answer_of(make_engine(), text_request("one two three"))

    assert answer.words == ["one ", "two "]
    assert answer.outputs[-1].words == ()
    assert error_of(answer).startswith("WORKER_LOST: ")


def test_a_server_that_is_gone_fails_what_is_sent_to_it(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    engine = make_engine()
    server.stop()

    engine.submit(text_request())
    (output,) = step_until(engine, bool)

    assert (output.error or "").startswith(f"WORKER_LOST: nothing answers at {server.url}")
    assert engine.load().out_of_service == output.error


def test_an_engine_whose_server_is_back_takes_requests_again(
    server: OpenAiUpstreamServer, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    server.stop()
    engine.submit(text_request(number=1))
    step_until(engine, bool)

    with OpenAiUpstreamServer(port=server.port) as again:
        step_until_in_service(engine)
        answer = answer_of(engine, text_request(number=2))

        assert answer.finish is FinishReason.LENGTH
        assert len(again.requests) == 1


def test_a_server_with_another_model_is_not_back(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    engine = make_engine()
    server.models = [{"id": "another"}]
    server.script = Script(status=404)
    for number in range(3):
        engine.submit(text_request(number=number))
    step_until(engine, lambda outputs: len(outputs) == 3)
    asked = len(server.request_headers)

    while len(server.request_headers) < asked + 2:  # a second probe: the first has been judged
        engine.step()

    assert "UNKNOWN_MODEL" in engine.load().out_of_service


@pytest.mark.parametrize("status", [500, 401, 404, 504])
def test_failures_in_a_row_put_a_server_out_of_service(
    status: int, server: OpenAiUpstreamServer, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    server.script = Script(status=status)
    said = []
    for number in range(3):
        engine.submit(text_request(number=number))
        step_until(engine, bool)
        said.append(bool(engine.load().out_of_service))

    assert said == [False, False, True]


@pytest.mark.parametrize("status", [400, 429])
def test_what_only_the_request_is_refused_for_is_no_reason_to_go(
    status: int, server: OpenAiUpstreamServer, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    server.script = Script(status=status)
    for number in range(5):
        answer_of(engine, text_request(number=number))

    assert engine.load().out_of_service == ""
    assert not engine.has_work()


def test_the_operator_reads_where_a_request_was_refused(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    server.script = Script(status=400)

    answer = answer_of(make_engine(), text_request())

    last = answer.outputs[-1]
    assert last.failure is not None
    assert server.url not in last.failure.message
    assert error_of(answer).endswith(f"answered 400: as the test wants it ({server.url})")


def test_an_end_that_says_nothing_at_all_is_none(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    server.script = Script(words=[], says_finish=False)

    answer = answer_of(make_engine(), text_request())

    assert answer.finish is None
    assert "ended its stream before the answer did" in error_of(answer)


def test_cancel_closes_the_upstreams_request_and_frees_its_place(
    server: OpenAiUpstreamServer, make_engine: MakeEngine
) -> None:
    server.script = Script(hold_after=1)
    engine = make_engine(max_sequences=1)
    engine.submit(text_request(number=1))
    step_until(engine, bool)
    engine.submit(text_request(number=2))

    was_here = engine.cancel(attempt(1))
    server.wait_gone(1)
    server.script = Script()
    run = run_all(engine)

    assert was_here
    assert set(run.answers) == {attempt(2)}
    assert run.answers[attempt(2)].finish is FinishReason.LENGTH


def test_what_a_cancelled_request_had_said_is_not_its_successors(
    server: OpenAiUpstreamServer, make_engine: MakeEngine
) -> None:
    server.script = Script(words=["old"] * 4, hold_after=2)
    engine = make_engine()
    engine.submit(text_request())
    step_until(engine, bool)
    engine.cancel(attempt(1))
    server.script = Script(words=["new"] * 2)

    answer = answer_of(engine, text_request())

    assert answer.words == ["new", "new"]


def test_no_more_than_the_slots_are_asked_for_at_once(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    engine = make_engine(max_sequences=2)
    for number in range(7):
        engine.submit(text_request(number=number))

    run = run_all(engine)

    assert len(run.answers) == 7
    assert server.most_open <= 2


def test_a_prefill_only_request_asks_nothing_of_the_upstream(
    server: OpenAiUpstreamServer, make_engine: MakeEngine
) -> None:
    request = EngineRequest(attempt(1), Sampling(max_tokens=1), text="one", prefill_only=True)

    answer = answer_of(make_engine(), request)

    assert answer.finish is FinishReason.PREFILLED
    assert server.requests == []


def test_a_step_with_nothing_to_hand_over_waits_a_moment(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    server.script = Script(hold_after=1)
    engine = make_engine()
    engine.submit(text_request())
    step_until(engine, bool)
    steps, until = 0, time.monotonic() + 0.2

    while time.monotonic() < until:
        assert engine.step().outputs == ()
        steps += 1

    assert 0 < steps <= 60


def test_closing_ends_what_runs_and_the_thread(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    server.script = Script(hold_after=1)
    engine = make_engine()
    engine.submit(text_request())
    step_until(engine, bool)

    engine.close()
    engine.close()

    server.wait_gone(1)
    assert [thread.name for thread in threading.enumerate() if thread.name == "openai_upstream-streams"] == []


def test_nothing_at_the_url_is_refused_with_what_to_do(make_engine: MakeEngine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"

    with pytest.raises(TryElsewhereError, match="start the server or fix --engine-option url") as caught:
        make_engine(url=url)

    assert caught.value.reason is Reason.WORKER_LOST
    assert url in caught.value.message


def test_a_url_without_an_api_is_refused(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    with pytest.raises(TryElsewhereError, match="most end in /v1"):
        make_engine(url=server.url.removesuffix("/v1"))


def test_a_model_that_is_not_listed_is_refused_with_the_nearest(make_engine: MakeEngine) -> None:
    with pytest.raises(NotKnownError, match="the nearest is upstream-model"):
        make_engine(model="upstream_model")


def test_an_upstream_without_models_is_refused(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    server.models = []

    with pytest.raises(NotKnownError, match="lists no model"):
        make_engine()


def test_a_named_model_needs_no_list(server: OpenAiUpstreamServer, make_engine: MakeEngine) -> None:
    server.models = []

    answer_of(make_engine(model="other"), text_request())

    assert server.requests[0]["model"] == "other"


def test_the_context_that_the_upstream_lists_bounds_token_prompts(
    server: OpenAiUpstreamServer, make_engine: MakeEngine
) -> None:
    server.models = [{"id": "m", "max_model_len": 8}]
    tokens = np.ones(8, dtype=np.uint32)
    by_tokens, by_text = make_engine(prompts="tokens"), make_engine()

    with pytest.raises(FixRequestError, match="context of 8") as caught:
        by_tokens.submit(EngineRequest(attempt(1), Sampling(max_tokens=1), token_ids=tokens))

    assert caught.value.field == "token_ids"
    assert by_tokens.info.max_context_tokens == 8
    assert by_text.info.max_context_tokens == 0


def test_an_adapter_is_refused(make_engine: MakeEngine) -> None:
    request = EngineRequest(attempt(1), Sampling(max_tokens=1), text="one", lora="mine")

    assert error_of(answer_of(make_engine(), request)).startswith("INVALID_FIELD: lora")


class _Events:
    """Tells one block with the first request's answer, and that all is gone when it is closed."""

    def __init__(self, publish: Publish) -> None:
        self.publish = publish
        self.is_closed = False

    def start(self) -> None:
        self.publish([STORED])

    async def aclose(self) -> None:
        self.is_closed = True


def test_events_of_the_upstreams_cache_come_with_the_steps(make_engine: MakeEngine) -> None:
    sources: list[_Events] = []

    def open_events(publish: Publish) -> _Events:
        sources.append(_Events(publish))
        return sources[0]

    engine = make_engine(prompts="tokens", open_events=open_events)
    engine.submit(EngineRequest(attempt(1), Sampling(max_tokens=1), token_ids=np.ones(3, dtype=np.uint32)))
    events: list[KvEvent] = []
    outputs: list[Output] = []
    while not any(output.finish for output in outputs):
        result = engine.step()
        outputs += result.outputs
        events += result.kv_events
    was_cached = engine.cached_blocks(STORED.block_hashes)
    sources[0].publish([CacheCleared()])

    assert engine.has_work()
    events += engine.step().kv_events
    engine.close()

    assert events == [STORED, CacheCleared()]
    assert (was_cached, engine.cached_blocks(STORED.block_hashes)) == (1, 0)
    assert sources[0].is_closed


def test_what_the_events_told_is_what_a_request_is_said_to_find(
    server: OpenAiUpstreamServer, make_engine: MakeEngine
) -> None:
    engine = make_engine(prompts="tokens", block_size=4, open_events=_Events)
    tokens = np.arange(1, 10, dtype=np.uint32)
    request = EngineRequest(
        attempt(1), Sampling(max_tokens=1), token_ids=tokens, block_hashes=(SequenceHash(1), SequenceHash(2))
    )
    step_events = engine.drain_kv_events()
    while not step_events:
        step_events = engine.step().kv_events

    engine.submit(request)
    by_events = step_until(engine, lambda outputs: any(output.finish for output in outputs))
    server.script = Script(usage={"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}})
    engine.submit(request)
    by_usage = step_until(engine, lambda outputs: any(output.finish for output in outputs))

    assert next(output for output in by_events if output.prefill_done).cached_tokens == 4
    assert by_usage[-1].cached_tokens == 8


def test_an_event_source_that_cannot_start_is_told(make_engine: MakeEngine) -> None:
    def open_events(publish: Publish) -> _Events:
        raise MeshError(Reason.UNIMPLEMENTED, "not installed here")

    with pytest.raises(MeshError, match="not installed here"):
        make_engine(prompts="tokens", open_events=open_events)
