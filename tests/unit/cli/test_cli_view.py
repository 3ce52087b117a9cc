"""The view of a mesh: what of a topology reaches the screen."""

import io
import shlex

import pytest
from rich.console import Console, RenderableType

from kvmesh.cli.explanation import explanation_view
from kvmesh.cli.status import state_name, topology_json
from kvmesh.cli.view import Doors, TokenRate, curl_line, mesh_view, topology_view
from kvmesh.v1 import frontend_pb2, router_pb2

DOORS = Doors(http_address="127.0.0.1:8000", grpc_address="127.0.0.1:50051")


def rendered(view: RenderableType, *, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def mesh_of(*workers: frontend_pb2.TopologyWorker) -> frontend_pb2.Topology:
    return frontend_pb2.Topology(workers=workers, policy="kv_aware")


def decode_worker(number: int, **fields: object) -> frontend_pb2.TopologyWorker:
    worker = frontend_pb2.TopologyWorker(
        id=f"NODE{number}/decode/0", role="decode", state=frontend_pb2.WORKER_STATE_READY
    )
    for name, value in fields.items():
        setattr(worker, name, value)
    return worker


def test_a_worker_s_row_has_its_figures() -> None:
    worker = decode_worker(
        1, active_requests=7, waiting_requests=2, active_blocks=64, total_blocks=256, prefix_hit_rate=0.5
    )

    row = next(line for line in rendered(topology_view(mesh_of(worker))).splitlines() if "NODE1/decode/0" in line)

    cells = row.split()
    assert cells[:6] == ["NODE1/decode/0", "decode", "ready", "7", "2", "64/256"]
    assert cells[-1] == "50%"


@pytest.mark.parametrize(("active", "cells"), [(0, 0), (64, 4), (256, 16)])
def test_the_bar_is_as_full_as_the_pool(active: int, cells: int) -> None:
    topology = mesh_of(decode_worker(1, active_blocks=active, total_blocks=256))

    assert rendered(topology_view(topology)).count("━") == cells


def test_a_worker_without_a_pool_has_no_bar() -> None:
    screen = rendered(topology_view(mesh_of(decode_worker(1))))

    assert "━" not in screen
    assert "0/0" not in screen


def test_nothing_of_the_table_is_cut_on_a_terminal_of_80_columns() -> None:
    topology = mesh_of(decode_worker(10, active_blocks=16_384, total_blocks=16_384, prefix_hit_rate=1.0))
    topology.workers[0].state = frontend_pb2.WORKER_STATE_DRAINING

    heading, row = rendered(topology_view(topology, width=80), width=80).splitlines()[:2]

    assert heading.split() == ["worker", "role", "state", "active", "waiting", "blocks", "cache", "hits"]
    assert row.split() == ["NODE10/decode/0", "decode", "draining", "0", "0", "16384/16384", "100%"]


def test_queue_and_requests_are_told_in_words() -> None:
    topology = mesh_of(decode_worker(1))
    topology.queue.CopyFrom(frontend_pb2.QueueStats(depth=3, leased=2, dead=1))
    topology.counters.CopyFrom(
        frontend_pb2.TopologyCounters(
            requests=12,
            running=5,
            failed=1,
            completion_tokens=900,
            remote_prefills=4,
            local_prefills=8,
            prompt_tokens=1_000,
            cached_tokens=412,
            predicted_cached_tokens=420,
        )
    )

    screen = rendered(topology_view(topology, tokens_per_s=123.4))

    assert "3 waiting, 2 leased, 1 dead" in screen
    assert "12 requests, 5 running, 1 failed, 900 tokens, 123 tokens/s, prefills: 4 remote, 8 local" in screen
    assert "41.2% of prompt tokens hit, 42.0% predicted by kv_aware" in screen


@pytest.mark.parametrize(
    ("moved", "told"),
    [
        (0, "2 local\n"),
        (960, "2 local, 960 bytes of KV moved"),
        (24_576, "24.0 KiB of KV moved"),
        (3 << 41, "6.0 TiB of"),
    ],
)
def test_kv_that_moved_is_told_in_the_unit_that_fits(moved: int, told: str) -> None:
    topology = mesh_of(decode_worker(1))
    topology.counters.CopyFrom(frontend_pb2.TopologyCounters(local_prefills=2, kv_bytes_moved=moved))

    screen = "\n".join(line.rstrip() for line in rendered(topology_view(topology)).splitlines())

    assert told in screen


def silent_mesh() -> frontend_pb2.Topology:
    worker = decode_worker(1, state=frontend_pb2.WORKER_STATE_UNSPECIFIED, total_blocks=256, load_unknown=True)
    return frontend_pb2.Topology(workers=[worker], router_silent=True, queue_silent=True)


def test_what_a_silent_router_and_a_silent_queue_would_tell_is_shown_as_unknown() -> None:
    lines = [line.split() for line in rendered(topology_view(silent_mesh())).splitlines()]

    assert lines[1] == ["NODE1/decode/0", "decode", "unknown", "-", "-", "-/256", "-"]
    assert lines[2] == ["router", "not", "answering"]
    assert lines[3] == ["queue", "not", "answering"]
    assert lines[5] == ["cache", "-", "of", "prompt", "tokens", "hit,", "-", "predicted"]


def test_a_mesh_without_a_queue_says_that_none_is_known() -> None:
    assert "queue     none known" in rendered(topology_view(mesh_of(decode_worker(1))))


def test_what_is_unknown_is_null_in_json() -> None:
    shown = topology_json(silent_mesh())

    (worker,) = shown["workers"]
    assert (shown["policy"], shown["queue"], shown["counters"]["reservations"]) == (None, None, None)
    assert (shown["router_silent"], shown["queue_silent"]) == (True, True)
    assert (worker["state"], worker["total_blocks"]) == ("unknown", 256)
    assert {key for key, value in worker.items() if value is None} == {
        "active_requests", "active_blocks", "waiting_requests", "prefix_hit_rate", "active_prefill_tokens",
        "indexed_blocks", "index_degraded", "reservations",
    }  # fmt: skip


def test_before_the_first_request_there_is_no_hit_rate() -> None:
    assert "- of prompt tokens hit, - predicted" in rendered(topology_view(mesh_of(decode_worker(1))))


def test_the_live_view_tells_where_the_mesh_is_and_how_to_try_it() -> None:
    screen = rendered(mesh_view(mesh_of(decode_worker(1)), DOORS, tokens_per_s=0.0))

    assert "http://127.0.0.1:8000" in screen
    assert "127.0.0.1:50051" in screen
    assert curl_line("127.0.0.1:8000") in screen


def test_the_curl_line_is_the_hello_world() -> None:
    assert curl_line("127.0.0.1:8000") == """curl -s 127.0.0.1:8000/generate -d '{"prompt": "Tell me a joke"}'"""


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "inference-gateway-7.cluster.example"])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_what_to_copy_is_the_same_command_on_a_narrow_terminal(host: str, width: int) -> None:
    doors = Doors(http_address=f"{host}:8000", grpc_address="127.0.0.1:50051")

    screen = rendered(mesh_view(mesh_of(), doors, tokens_per_s=0.0, width=width), width=width)

    copied = screen[screen.index("curl") :].partition("\n\n")[0]  # up to the blank line
    command = copied.replace("\\\n", "")  # as a shell reads it
    assert shlex.split(command) == ["curl", "-s", f"{host}:8000/generate", "-d", '{"prompt": "Tell me a joke"}']


def test_workers_beyond_the_screen_are_counted() -> None:
    topology = mesh_of(*(decode_worker(number) for number in range(1, 65)))

    screen = rendered(mesh_view(topology, DOORS, tokens_per_s=0.0, max_workers=8))

    assert "NODE8/decode/0" in screen
    assert "NODE9/decode/0" not in screen
    assert "and 56 more" in screen


def test_a_mesh_without_workers_says_so() -> None:
    assert "no workers" in rendered(topology_view(mesh_of()))


def test_markup_in_an_id_is_shown_as_it_is() -> None:
    worker = decode_worker(1)
    worker.id = "[red]NODE[/red]/decode/0"

    assert "[red]NODE[/red]/decode/0" in rendered(topology_view(mesh_of(worker)))


@pytest.mark.parametrize(
    ("state", "name"),
    [
        (frontend_pb2.WORKER_STATE_READY, "ready"),
        (frontend_pb2.WORKER_STATE_DRAINING, "draining"),
        (frontend_pb2.WORKER_STATE_SUSPECT, "suspect"),
        (frontend_pb2.WORKER_STATE_UNSPECIFIED, "unknown"),
    ],
)
def test_states_are_in_lower_case(state: frontend_pb2.WorkerState.ValueType, name: str) -> None:
    assert state_name(state) == name


def test_the_token_rate_is_that_since_the_last_look() -> None:
    rate = TokenRate()

    rates = [
        rate.update(now_s=now_s, completion_tokens=tokens) for now_s, tokens in [(10, 100), (12, 300), (12.5, 310)]
    ]

    assert rates == [0.0, 100.0, 20.0]


def test_the_token_rate_is_never_negative_or_infinite() -> None:
    rate = TokenRate()
    rate.update(now_s=10, completion_tokens=100)

    assert rate.update(now_s=10, completion_tokens=200) == 0.0
    assert rate.update(now_s=11, completion_tokens=0) == 0.0


def test_an_explanation_has_a_column_per_term_and_tells_what_went_wrong() -> None:
    explanation = router_pb2.Explanation(
        policy="mine",
        worker_id="B",
        rank=1,
        fallback="mine raised KeyError",
        staleness_ignored=True,
        candidates=[
            router_pb2.CandidateExplanation(worker_id="B", rank=1, cost=0.25, terms={"decode_blocks": 0.25}),
            router_pb2.CandidateExplanation(worker_id="B", cost=2, terms={"overlap_blocks": 3}, lost="cost 2 > 0.25"),
        ],
    )

    lines = [line.split() for line in rendered(explanation_view(explanation)).splitlines()]

    assert lines[0][:4] == ["worker", "cost", "overlap_blocks", "decode_blocks"]
    assert lines[1] == ["B#1", "0.25", "-", "0.25", "-", "-", "chosen"]
    assert lines[2][:4] == ["B", "2", "3", "-"]
    assert lines[5][:4] == ["most", "loads", "were", "stale,"]
    assert lines[6][-3:] == ["mine", "raised", "KeyError"]


def test_an_explanation_on_a_narrow_screen_breaks_the_names_of_its_terms() -> None:
    names = ["prefill_blocks", "credit_blocks", "prefill_cost", "decode_cost", "request_cost", "overlap_blocks"]
    explanation = router_pb2.Explanation(
        worker_id="B",
        candidates=[
            router_pb2.CandidateExplanation(worker_id=worker, terms=dict.fromkeys(names, value))
            for worker, value in (("A", 1.0), ("B", 2.0))
        ],
    )

    lines = [line.split() for line in rendered(explanation_view(explanation, width=80)).splitlines()]

    assert lines[0] == [name.split("_")[0] for name in names]
    assert lines[1][:8] == ["worker", "cost", *(name.split("_")[1] for name in names)]
