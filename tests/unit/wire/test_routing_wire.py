"""Queries, progress and answers of the router, between protobuf and core."""

from dataclasses import replace
from typing import Any

import pytest

from kvmesh.core.candidates import Candidate, RoutingHints, RoutingQuery, Scored, Selection, Terms
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, WorkerId, WorkerRank
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.core.remote_prefill import RemotePrefillDecision, RemotePrefillReason
from kvmesh.core.roster import WorkerRecord
from kvmesh.v1 import generation_pb2, router_pb2
from kvmesh.wire.routing import Progress, key_from_proto, progress_from_proto, query_from_proto, query_to_proto
from kvmesh.wire.routing_answers import explanation_to_proto, selected_worker_to_proto

SEQUENCE_OF_64 = (15310707395893867146, 13769157705258532664, 11879827756109914528, 3888788807566526800)
"""Published hashes of the tokens 0 to 63 in blocks of 16."""


def proto(**fields: Any) -> router_pb2.RoutingQuery:
    return router_pb2.RoutingQuery(model="m", **fields)


def tokens(*ids: int) -> generation_pb2.TokenIds:
    return generation_pb2.TokenIds(token_ids=ids)


def local_hashes(query: RoutingQuery, block_size: int) -> tuple[int, ...]:
    blocks = query.block_hashes[block_size]
    assert isinstance(blocks, PromptBlocks)
    assert blocks.local is not None
    return blocks.local


def test_tokens_are_counted_and_hashed_for_every_block_size() -> None:
    query = query_from_proto(proto(token_ids=tokens(*range(64))), block_sizes={16, 64})

    assert query.prompt_tokens == 64
    assert query.block_hashes == {16: SEQUENCE_OF_64, 64: (3480597578098033343,)}


def test_a_count_of_tokens_that_is_theirs_passes_and_so_do_spans_side_by_side() -> None:
    spans = [router_pb2.MultimodalSpan(first_token=first, token_count=2) for first in (2, 0)]

    query = query_from_proto(proto(token_ids=tokens(*range(4)), prompt_tokens=4, multimodal=spans), block_sizes={4})

    assert query.prompt_tokens == 4


def test_packed_tokens_are_the_same_tokens() -> None:
    packed = b"".join(token.to_bytes(4, "little") for token in range(64))

    query = query_from_proto(proto(packed_token_ids=packed), block_sizes={16})

    assert (query.prompt_tokens, query.block_hashes) == (64, {16: SEQUENCE_OF_64})


def test_lora_and_cache_namespace_are_part_of_the_identity() -> None:
    hints = generation_pb2.RoutingHints(lora="adapter-a", cache_namespace="tenant-a")

    query = query_from_proto(proto(token_ids=tokens(0, 1, 2, 3), hints=hints), block_sizes={4})

    assert query.block_hashes == {4: (8269515957840517240,)}
    assert (query.lora, query.cache_namespace) == ("adapter-a", "tenant-a")


def test_text_is_hashed_over_its_utf8_bytes() -> None:
    of_text = query_from_proto(proto(text="é="), block_sizes={3})
    of_bytes = query_from_proto(proto(token_ids=tokens(0xC3, 0xA9, 0x3D)), block_sizes={3})

    assert of_text.prompt_tokens == 3
    assert of_text.block_hashes == of_bytes.block_hashes
    assert of_text.prompt_text == "é="


def test_what_a_block_shows_is_part_of_its_identity() -> None:
    image = router_pb2.MultimodalSpan(first_token=0, token_count=1, content_hash=42)

    query = query_from_proto(proto(token_ids=tokens(0, 1, 2, 3), multimodal=[image]), block_sizes={2})

    assert local_hashes(query, 2) == (6100948656312251355, 10731123482949079648)


def test_an_image_over_a_boundary_belongs_to_both_blocks() -> None:
    image = router_pb2.MultimodalSpan(first_token=1, token_count=2, content_hash=42)
    plain, shown = (
        local_hashes(query_from_proto(proto(token_ids=tokens(*range(6)), multimodal=spans), block_sizes={2}), 2)
        for spans in ([], [image])
    )

    same = [a == b for a, b in zip(plain, shown, strict=True)]

    assert same == [False, False, True]


def test_local_hashes_name_the_same_blocks_as_the_sequence_hashes_made_of_them() -> None:
    hashes = router_pb2.BlockHashes(block_size=16, local_hashes=[11, 22, 33])

    query = query_from_proto(proto(block_hashes=hashes, prompt_tokens=48), block_sizes={16})

    assert query.block_hashes == {16: (11, 750553365844651409, 3257565445809651757)}


def test_query_survives_the_wire() -> None:
    hints = RoutingHints(pinned_worker=WorkerId("w"), pinned_rank=0, priority=3, session_id="s")
    blocks = PromptBlocks.of_sequence([1, 2], 4)
    sent = RoutingQuery(model="m", prompt_tokens=20, block_hashes={4: blocks}, hints=hints, expected_output_tokens=7)

    received = query_from_proto(query_to_proto(sent), block_sizes={4})

    assert received.block_hashes == {4: (1, 2)}
    assert replace(received, block_hashes={}) == replace(sent, block_hashes={})


def test_given_hashes_are_taken_as_they_are() -> None:
    hashes = router_pb2.BlockHashes(block_size=16, sequence_hashes=[1, 2])

    query = query_from_proto(proto(block_hashes=hashes, prompt_tokens=40), block_sizes={16})

    assert (query.prompt_tokens, query.block_hashes) == (40, {16: (1, 2)})


def test_unset_fields_are_none_and_set_ones_are_kept() -> None:
    hints = generation_pb2.RoutingHints(
        pinned_worker_id="w",
        allowed_worker_ids=["a"],
        excluded_worker_ids=["b", "c"],
        required_labels={"zone": "x"},
        session_id="s",
        priority=0,
        cost=generation_pb2.CostOverrides(overlap_credit=0),
    )

    bare = query_from_proto(proto(text="x"), block_sizes=())
    full = query_from_proto(proto(text="x", hints=hints, expected_output_tokens=5), block_sizes=())

    assert (bare.hints.pinned_worker, bare.hints.session_id, bare.expected_output_tokens) == (None, None, None)
    assert (bare.hints.priority, bare.hints.overrides.overlap_credit) == (10, None)
    assert (full.hints.pinned_worker, full.hints.session_id, full.expected_output_tokens) == ("w", "s", 5)
    assert (full.hints.priority, full.hints.overrides.overlap_credit) == (0, 0.0)
    assert full.hints.overrides.temperature is None
    assert sorted(full.hints.allowed_workers) == ["a"]
    assert sorted(full.hints.excluded_workers) == ["b", "c"]
    assert full.hints.required_labels == {"zone": "x"}


@pytest.mark.parametrize(
    ("query", "field"),
    [
        (router_pb2.RoutingQuery(text="x"), "query.model"),
        (proto(), "query"),
        (proto(block_hashes=router_pb2.BlockHashes(block_size=16)), "query.prompt_tokens"),
        (proto(block_hashes=router_pb2.BlockHashes(), prompt_tokens=1), "query.block_hashes.block_size"),
        (proto(block_hashes=router_pb2.BlockHashes(block_size=8), prompt_tokens=1), "query.block_hashes.block_size"),
        (
            proto(block_hashes=router_pb2.BlockHashes(block_size=16, sequence_hashes=[1, 2]), prompt_tokens=31),
            "query.block_hashes.sequence_hashes",
        ),
        (
            proto(
                block_hashes=router_pb2.BlockHashes(block_size=16, sequence_hashes=[1], local_hashes=[1]),
                prompt_tokens=31,
            ),
            "query.block_hashes.local_hashes",
        ),
        (
            proto(token_ids=tokens(1, 2, 3), multimodal=[router_pb2.MultimodalSpan(first_token=2, token_count=2)]),
            "query.multimodal[0]",
        ),
        (
            proto(
                packed_token_ids=bytes(16),
                multimodal=[
                    router_pb2.MultimodalSpan(first_token=1, token_count=2),
                    router_pb2.MultimodalSpan(first_token=3, token_count=1),
                    router_pb2.MultimodalSpan(first_token=0, token_count=2),
                ],
            ),
            "query.multimodal[0]",
        ),
        (proto(text="xyz", multimodal=[router_pb2.MultimodalSpan(token_count=1)]), "query.multimodal"),
        (proto(prompt_tokens=3, multimodal=[router_pb2.MultimodalSpan(token_count=1)]), "query.multimodal"),
        (proto(token_ids=tokens(1, 2), prompt_tokens=3), "query.prompt_tokens"),
        (proto(packed_token_ids=bytes(8), prompt_tokens=1), "query.prompt_tokens"),
        (proto(packed_token_ids=b"12345"), "query.packed_token_ids"),
        (proto(text="x", hints={"pinned_rank": 0}), "query.hints.pinned_rank"),
        (proto(text="x", hints={"session_id": "é" * 129}), "query.hints.session_id"),
        (proto(prompt_tokens=(1 << 24) + 1), "query.prompt_tokens"),
        (
            proto(text="x", hints={"cost": {"temperature": -1}}),
            "query.hints.cost.temperature",
        ),
    ],
)
def test_bad_query_is_refused_naming_the_field(query: router_pb2.RoutingQuery, field: str) -> None:
    with pytest.raises(FixRequestError) as caught:
        query_from_proto(query, block_sizes={16})

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, field)


@pytest.mark.parametrize("query", [proto(text=""), proto(token_ids=tokens()), proto(packed_token_ids=b"")])
def test_empty_prompt_is_refused(query: router_pb2.RoutingQuery) -> None:
    with pytest.raises(FixRequestError) as caught:
        query_from_proto(query, block_sizes={16})

    assert caught.value.reason is Reason.EMPTY_PROMPT


def test_hashes_of_any_size_pass_while_nobody_serves_the_model() -> None:
    hashes = router_pb2.BlockHashes(block_size=8, sequence_hashes=[1])

    query = query_from_proto(proto(block_hashes=hashes, prompt_tokens=8), block_sizes=())

    assert query.block_hashes == {8: (1,)}


def test_request_id_of_256_bytes_is_the_longest() -> None:
    longest = "\N{LLAMA}" * 64

    assert key_from_proto(longest, 1) == AttemptKey(RequestId(longest), 1)
    with pytest.raises(FixRequestError) as caught:
        key_from_proto(longest + "x", 1)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "request_id")


@pytest.mark.parametrize(
    ("request_id", "attempt", "field"),
    [("", 1, "key.request_id"), ("r" * 257, 1, "key.request_id"), ("r", 0, "key.attempt")],
)
def test_bad_key_is_refused_naming_the_field(request_id: str, attempt: int, field: str) -> None:
    with pytest.raises(FixRequestError) as caught:
        key_from_proto(request_id, attempt, path="key.")

    assert caught.value.field == field


def test_progress_tells_a_load_sequence_of_zero_from_none() -> None:
    line = router_pb2.ReservationProgress(request_id="r", attempt=2, prefill_complete=True, output_blocks=3)
    with_zero = router_pb2.ReservationProgress(request_id="r", attempt=2, accepted_load_sequence=0)
    key = AttemptKey(RequestId("r"), 2)

    assert progress_from_proto(line, path="") == Progress(key=key, prefill_complete=True, output_blocks=3)
    assert progress_from_proto(with_zero, path="") == Progress(key=key, accepted_load_sequence=0)


def test_progress_of_more_blocks_than_any_output_takes_is_refused_naming_the_field() -> None:
    most = router_pb2.ReservationProgress(request_id="r", attempt=1, output_blocks=2**20)
    more = router_pb2.ReservationProgress(request_id="r", attempt=1, output_blocks=2**20 + 1)

    assert progress_from_proto(most, path="progress[0].").output_blocks == 1_048_576
    with pytest.raises(FixRequestError) as caught:
        progress_from_proto(more, path="progress[1].")

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "progress[1].output_blocks")


def test_explanation_shows_every_candidate_by_cost_and_who_was_rejected() -> None:
    cheap, dear, drained = (WorkerRank(WorkerId(name)) for name in ("cheap", "dear", "drained"))
    terms = Terms(prefill_blocks=4, credit_blocks=1, prefill_cost=3, decode_cost=5, request_cost=0)
    selection = Selection(
        worker=dear,
        policy="kv_aware",
        note="drawn",
        scores=(Scored(cheap, 8.0, terms), Scored(dear, 9.0)),
        cost=9.0,
        query=RoutingQuery(model="m", prompt_tokens=64),
        candidates=(
            Candidate(
                worker=cheap,
                block_size=16,
                overlap_blocks=1,
                load_age_s=1.5,
                is_reported=True,
                index_age_s=0.25,
                active_blocks=5,
            ),
            Candidate(worker=dear, block_size=16, load_age_s=9.0),
        ),
        excluded=((Candidate(worker=drained, block_size=16), "draining"),),
        is_staleness_ignored=True,
        knobs={"temperature": 0.5},
        seed=2**63,
        remote_prefill=RemotePrefillDecision(RemotePrefillReason.DEEP_QUEUE),
    )

    explanation = explanation_to_proto(selection)

    first, second = explanation.candidates
    assert (first.worker_id, first.cost, second.worker_id, second.cost) == ("cheap", 8.0, "dear", 9.0)
    assert (second.lost, bool(first.lost)) == ("", True)
    assert (first.terms["overlap_blocks"], first.terms["prefill_cost"], first.terms["decode_blocks"]) == (1, 3, 5)
    assert (first.load_age.ToMilliseconds(), first.kv_age.ToMilliseconds()) == (1500, 250)
    assert not second.HasField("load_age")
    assert not second.HasField("kv_age")
    assert [(rejected.worker_id, rejected.reason) for rejected in explanation.rejected] == [("drained", "draining")]
    assert (explanation.worker_id, explanation.policy, explanation.prompt_tokens) == ("dear", "kv_aware", 64)
    assert explanation.staleness_ignored
    assert (dict(explanation.knobs), explanation.seed, explanation.note) == ({"temperature": 0.5}, 2**63, "drawn")
    assert (explanation.prefill.remote, explanation.prefill.reason) == (False, "deep_queue")
    assert (first.inputs["active_blocks"], first.inputs["active_prefill_tokens"]) == (5, 0)


def test_selected_worker_carries_where_it_serves() -> None:
    selection = Selection(worker=WorkerRank(WorkerId("w"), 1), policy="p", epoch=Epoch(7), overlap_blocks=2, cost=1.5)
    record = WorkerRecord(worker_id=WorkerId("w"), epoch=Epoch(7), models=("m",), block_size=16, address="host:1")

    selected = selected_worker_to_proto(selection, record)

    assert selected == router_pb2.SelectedWorker(
        worker_id="w", epoch=7, rank=1, address="host:1", overlap_blocks=2, block_size=16, cost=1.5
    )
