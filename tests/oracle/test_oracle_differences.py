"""Where the two sides differ on purpose: README.md has the reasons, and each is shown here on both."""

import random
from collections.abc import Callable
from typing import Any

from kvmesh.core.candidates import CostOverrides, RoutingHints, RoutingQuery
from kvmesh.core.hashing import sequence_hashes
from kvmesh.core.ids import AttemptKey, Epoch, RequestId, RouterId, WorkerId, WorkerRank
from kvmesh.core.policies.kv_aware import KvAware
from kvmesh.core.prefix_index import PrefixIndex, StoreResult
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.core.roster import WorkerRecord
from kvmesh.core.routing import RoutingCore

Ask = Callable[[str, list[Any]], list[Any]]

W1, W2 = WorkerRank(WorkerId("1")), WorkerRank(WorkerId("2"))
EPOCH = Epoch(1)
LOCAL = (1, 2, 3, 4, 5)
BLOCKS = sequence_hashes(LOCAL)
STORED = ["store", 1, 0, None, list(BLOCKS), list(LOCAL)]
QUERY = ["query", list(LOCAL)]


def holder_of_five() -> PrefixIndex:
    index = PrefixIndex()
    index.store(W1, parent=None, block_hashes=BLOCKS, local_hashes=LOCAL)
    return index


def router(*, worker_labels: dict[str, str] | None = None) -> RoutingCore:
    made = RoutingCore(RouterId("ours"), policy=KvAware(), rng=random.Random(1))
    for worker, labels in ((W1, worker_labels or {}), (W2, {})):
        record = WorkerRecord(worker_id=worker.worker_id, epoch=EPOCH, models=("m",), block_size=16, labels=labels)
        made.put_worker(record, now=0)
    return made


def query(first: int, blocks: int = 4, **hints: Any) -> RoutingQuery:
    """A prompt of whole blocks; another `first`, another prompt."""
    hashes = PromptBlocks.of_local(range(first, first + blocks), 16)
    return RoutingQuery(model="m", prompt_tokens=16 * blocks, block_hashes={16: hashes}, hints=RoutingHints(**hints))


def key(name: str) -> AttemptKey:
    return AttemptKey(RequestId(name), 1)


def peer_world(*steps: list[Any], labels: list[str] | None = None) -> dict[str, Any]:
    workers = [{"worker": 1, "ranks": 1, "labels": labels or [], "block_size": 16}]
    workers += [{"worker": 2, "ranks": 1, "labels": [], "block_size": 16}]
    return {"workers": workers, "steps": list(steps)}


def peer_query(first: int, blocks: int = 4, **more: Any) -> dict[str, Any]:
    return {"model_name": "m", "token_ids": [first] * (16 * blocks), **more}


# --- the index --------------------------------------------------------------------------------------------------------


def test_what_was_below_a_block_that_returns_is_attached_again(ask: Ask) -> None:
    index = holder_of_five()
    index.remove(W1, [BLOCKS[2]])
    without = index.match(BLOCKS)
    index.store(W1, parent=BLOCKS[1], block_hashes=[BLOCKS[2]], local_hashes=[3])

    removed, again = ["remove", 1, 0, [BLOCKS[2]]], ["store", 1, 0, BLOCKS[1], [BLOCKS[2]], [3]]
    theirs = ask("index_programs", [[STORED, removed, QUERY, again, QUERY]])[0]

    assert (without, index.match(BLOCKS)) == ({W1: 2}, {W1: 5})
    assert (theirs[2], theirs[4]) == ([[1, 0, 2]], [[1, 0, 3]])


def test_a_block_below_a_missing_one_can_be_stored_under_and_removed(ask: Ask) -> None:
    index = holder_of_five()
    index.remove(W1, [BLOCKS[2]])
    longer = sequence_hashes([*LOCAL, 6])
    stored = index.store(W1, parent=BLOCKS[4], block_hashes=[longer[5]], local_hashes=[6])
    removed_count = index.remove(W1, [longer[5], BLOCKS[4]])

    removed = ["remove", 1, 0, [BLOCKS[2]]]
    store_below, remove_below = ["store", 1, 0, BLOCKS[4], [longer[5]], [6]], ["remove", 1, 0, [BLOCKS[4]]]
    theirs = ask("index_programs", [[STORED, removed, store_below, remove_below]])[0]

    assert (stored.result, removed_count) == (StoreResult.STORED, 2)
    assert theirs[2:] == [False, False]


def test_a_block_has_one_parent_for_ever(ask: Ask) -> None:
    index = holder_of_five()
    moved = index.store(W1, parent=BLOCKS[0], block_hashes=[BLOCKS[2]], local_hashes=[3])

    theirs = ask("index_programs", [[STORED, ["store", 1, 0, BLOCKS[0], [BLOCKS[2]], [3]], ["query", [1, 3]], QUERY]])

    assert moved.result is StoreResult.CONFLICTING_PARENT
    assert index.match(BLOCKS) == {W1: 5}
    assert theirs[0][1:] == [True, [[1, 0, 2]], [[1, 0, 5]]]


def test_a_store_that_names_a_block_twice_is_refused_whole(ask: Ask) -> None:
    index = holder_of_five()
    six = sequence_hashes([*LOCAL, 6])[5]
    outcome = index.store(W1, parent=BLOCKS[4], block_hashes=[six, six], local_hashes=[6, 6])

    theirs = ask(
        "index_programs", [[STORED, ["store", 1, 0, BLOCKS[4], [six, six], [6, 6]], ["query", [*LOCAL, 6, 6]]]]
    )

    assert outcome.result is StoreResult.CONFLICTING_PARENT
    assert index.match(sequence_hashes([*LOCAL, 6])) == {W1: 5}
    assert theirs[0][1:] == [True, [[1, 0, 7]]]


# --- selections and bookings ------------------------------------------------------------------------------------------


def test_a_whole_prompt_in_a_cache_leaves_a_token_to_compute(ask: Ask) -> None:
    ours = router()
    asked = query(7)
    ours.apply_kv_stored(W1, EPOCH, parent=None, block_hashes=tuple(asked.block_hashes[16]), now=0)
    selection = ours.select(asked, now=0)

    local = ask("local_hashes", [[[7] * 64, 16, None, None, None]])[0]
    cached = ["events", [["store", 1, 0, None, [11, 12, 13, 14], local]]]
    theirs = ask("worlds", [peer_world(cached, ["select", peer_query(7)])])[0]

    assert (selection.worker, selection.overlap_blocks) == (W1, 3)
    assert theirs[1] == [1, 0, 0]


def test_knobs_of_a_request_are_heeded(ask: Ask) -> None:
    ours = router()
    for number in range(2):
        ours.reserve(key(f"booking {number}"), query(100 + 10 * number, 1, pinned_worker=W1.worker_id), now=0)
    cached = query(7, 5)
    ours.apply_kv_stored(W1, EPOCH, parent=None, block_hashes=tuple(cached.block_hashes[16])[:3], now=0)

    with_credit = ours.select(cached, now=0)
    without = ours.select(query(7, 5, overrides=CostOverrides(overlap_credit=1.5)), now=0)
    costs = [{scored.worker: scored.cost for scored in made.scores} for made in (with_credit, without)]

    assert costs == [{W1: 7 - 3 + 7, W2: 5 + 5}, {W1: 7 - 4.5 + 7, W2: 5 + 5}]
    assert (with_credit.worker, without.worker) == (W2, W1)

    pin = {"pinned_worker": {"worker_id": 1, "dp_rank": 0}}
    steps: list[list[Any]] = [["reserve", peer_query(100 + n, 1, selection_id=str(n), **pin)] for n in range(2)]
    local = ask("local_hashes", [[[7] * 80, 16, None, None, None]])[0]
    steps += [["events", [["store", 1, 0, None, [11, 12, 13], local[:3]]]], ["select", peer_query(7, 5)]]
    steps += [["select", peer_query(7, 5, router_config_override={"overlap_score_credit": 1.5})]]
    theirs = ask("worlds", [peer_world(*steps)])[0]
    assert [answer[0] for answer in theirs[-2:]] == [2, 2]


def test_preferred_labels_come_before_any_cost(ask: Ask) -> None:
    ours = router(worker_labels={"near": "yes"})
    steps: list[list[Any]] = []
    for number in range(10):
        ours.reserve(key(f"booking {number}"), query(100 + 10 * number, pinned_worker=W1.worker_id), now=0)
        pin = {"worker_id": 1, "dp_rank": 0}
        steps.append(["reserve", peer_query(100 + number, selection_id=str(number), pinned_worker=pin)])

    selection = ours.select(query(7, preferred_labels={"near": "yes"}), now=0)
    preferring = {"required_taints": [], "preferred_taints": {"near": 1.0}}
    theirs = ask(
        "worlds", [peer_world(*steps, ["select", peer_query(7, routing_constraints=preferring)], labels=["near"])]
    )[0]

    assert selection.worker == W1
    assert theirs[-1][0] == 2


def test_reserving_and_releasing_again_give_the_same_answer(ask: Ask) -> None:
    ours = router()
    first = ours.reserve(key("a"), query(7), now=0)
    again = ours.reserve(key("a"), query(7), now=1)
    released = [ours.release(key("a"), now=2), ours.release(key("a"), now=3)]
    ours.report_progress(key("a"), prefill_complete=True, now=4)

    reserve = ["reserve", peer_query(7, selection_id="a")]
    theirs = ask("worlds", [peer_world(reserve, reserve)])[0]

    assert again == first
    assert released == [True, False]
    assert theirs[1] == "selection a is already reserved or being reserved"


def test_only_output_blocks_decay(ask: Ask) -> None:
    ours = router()
    asked = RoutingQuery(model="m", prompt_tokens=64, block_hashes=query(7).block_hashes, expected_output_tokens=4 * 16)
    booked = ours.reserve(key("a"), asked, now=0).worker
    ours.report_progress(key("a"), output_blocks=1, now=0)
    ours.report_progress(key("a"), output_blocks=1, now=0)
    load = next(load for load in ours.potential_loads(query(1000, 0), now=0) if load.worker == booked)

    reserve = ["reserve", peer_query(7, selection_id="a", pinned_worker={"worker_id": 1, "dp_rank": 0})]
    output = [["output_block", "a", 0.75], ["output_block", "a", 0.5]]
    theirs = ask("worlds", [peer_world(reserve, *output, ["loads", peer_query(1000, 0)])])[0]

    assert load.decode_blocks == 6  # 4 + 0.75 + 0.5, in whole blocks
    assert theirs[-1][0] == [1, 0, 64, 3, 1]  # (4 + 2) * 0.5
