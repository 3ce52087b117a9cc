"""The oracle's side: run by the interpreter of .venv-oracle, it does on NVIDIA Dynamo's router core what it is told.

It says in a first line what it is, then answers each line of JSON on stdin with one on stdout. Its own log is off; it
opens no connection but to the loopback server below, which hands it KV events.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

Json = Any

DEFAULT_KNOBS = {"overlap_credit": 1.0, "prefill_scale": 1.0, "request_weight": 0.0, "temperature": 0.0}
KNOB_VARIABLES = {
    "overlap_credit": "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT",
    "prefill_scale": "DYN_ROUTER_PREFILL_LOAD_SCALE",
    "request_weight": "DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT",
    "temperature": "DYN_ROUTER_TEMPERATURE",
}
RANK_ENDPOINT = "tcp://127.0.0.1:9"
"""Where a worker's events would come from: nobody publishes there, and connecting is retried in silence."""


# --- hashes -----------------------------------------------------------------------------------------------------------


def local_hashes(cases: list[Json]) -> list[Json]:
    from dynamo._core import compute_block_hash_for_seq

    answers: list[Json] = []
    for tokens, block_size, lora, cache_namespace, multimodal in cases:
        try:
            answers.append(
                compute_block_hash_for_seq(
                    tokens, block_size, multimodal_infos(multimodal), lora, None, cache_namespace
                )
            )
        except ValueError as error:
            answers.append(str(error))
    return answers


def multimodal_infos(multimodal: list[list[int]] | None) -> Json:
    """One list of hashes per block; none of them, and a block shows nothing."""
    if multimodal is None:
        return None
    return [
        {"mm_objects": [{"mm_hash": shown, "offsets": []} for shown in hashes]} if hashes else None
        for hashes in multimodal
    ]


def sequence_hashes(cases: list[Json]) -> list[Json]:
    return asyncio.run(reserved_sequences(cases))


async def reserved_sequences(cases: list[Json]) -> list[Json]:
    """No call gives sequence hashes alone; a reservation's answer has them, signed."""
    answers: list[Json] = []
    async with service({"workers": [worker_of(size) for size in sorted({case[1] for case in cases})]}) as router:
        for number, (tokens, block_size, lora, cache_namespace, multimodal) in enumerate(cases):
            request = {
                "model_name": f"m{block_size}",
                "selection_id": str(number),
                "token_ids": tokens,
                "lora_name": lora,
                "cache_salt": cache_namespace,
                "block_mm_infos": multimodal_infos(multimodal),
            }
            answer = await router.select_and_reserve(request)
            await router.free_reservation(str(number))
            answers.append([signed % 2**64 for signed in answer["sequence_hashes"]])
    return answers


def worker_of(block_size: int) -> Json:
    return {"worker": block_size, "ranks": 1, "labels": [], "model": f"m{block_size}", "block_size": block_size}


# --- the index --------------------------------------------------------------------------------------------------------


def index_programs(programs: list[Json]) -> list[Json]:
    return [run_index(program) for program in programs]


def run_index(program: list[Json]) -> list[Json]:
    """Answer a change by whether it was taken, a query by [worker, rank, leading blocks] of every rank that has any, a
    dump by [worker, rank, block] of every block held."""
    from dynamo._core import RadixTree

    tree = RadixTree()
    answers: list[Json] = []
    for number, (kind, *operands) in enumerate(program):
        if kind == "query":
            found = tree.find_matches(operands[0]).scores
            answers.append(sorted([worker, rank, depth] for (worker, rank), depth in found.items()))
        elif kind == "dump":
            answers.append(sorted(held_blocks(tree.dump_tree_as_events())))
        elif kind == "remove_worker":
            tree.remove_worker(operands[0])
            answers.append(True)
        else:
            worker, rank, data = event_data(kind, operands)
            event = {"event_id": number, "data": data, "dp_rank": rank}
            try:
                tree.apply_event(worker, json.dumps(event).encode())
            except RuntimeError:
                answers.append(False)
            else:
                answers.append(True)
    return answers


def held_blocks(events: list[str]) -> Iterator[list[int]]:
    for event in map(json.loads, events):
        for block in event["event"]["data"]["stored"]["blocks"]:
            yield [event["worker_id"], event["event"]["dp_rank"], block["block_hash"]]


def event_data(kind: str, operands: list[Json]) -> tuple[int, int, Json]:
    worker, rank, *rest = operands
    if kind == "clear":
        return worker, rank, "cleared"
    if kind == "remove":
        return worker, rank, {"removed": {"block_hashes": rest[0]}}
    parent, blocks, local = rest
    pairs = [{"block_hash": block, "tokens_hash": of_tokens} for block, of_tokens in zip(blocks, local, strict=True)]
    return worker, rank, {"stored": {"parent_hash": parent, "start_position": None, "blocks": pairs}}


# --- selections -------------------------------------------------------------------------------------------------------


def worlds(worlds: list[Json]) -> list[Json]:
    return asyncio.run(run_worlds(worlds))


async def run_worlds(worlds: list[Json]) -> list[Json]:
    """All at once: a router waits for a second whenever events are delivered to it."""
    return await asyncio.gather(*map(run_world, worlds))


async def run_world(world: Json) -> list[Json]:
    async with service(world) as router:
        return [await run_step(router, kind, operands) for kind, *operands in world["steps"]]


async def run_step(router: Json, kind: str, operands: list[Json]) -> Json:
    """Answer by what was chosen, or by the figures asked for, each per [worker, rank]."""
    if kind == "events":
        await deliver(router, operands[0])
        return None
    if kind in ("select", "reserve"):
        return await choose(router, kind, operands[0])
    if kind == "overlaps":
        answer = await router.overlap_scores(operands[0])
        return sorted([one["worker_id"], one["dp_rank"], one["device_blocks"]] for one in answer["workers"])
    if kind == "loads":
        figures = ("worker_id", "dp_rank", "potential_prefill_tokens", "potential_decode_blocks", "active_requests")
        return sorted([one[figure] for figure in figures] for one in await router.potential_loads(operands[0]))
    if kind == "prefill_complete":
        await router.prefill_complete(operands[0])
    elif kind == "release":
        await router.free_reservation(operands[0])
    elif kind == "output_block":
        name, *decay_fraction = operands
        router.add_output_block(name, decay_fraction=decay_fraction[0] if decay_fraction else None)
    else:
        raise ValueError(kind)
    return None


async def choose(router: Json, kind: str, request: Json) -> Json:
    from dynamo._core import SelectionServiceError

    call = router.select if kind == "select" else router.select_and_reserve
    try:
        answer = await call(request)
    except SelectionServiceError as error:
        return str(error)
    return [answer["worker_id"], answer["dp_rank"], answer["effective_prefill_tokens"]]


@asynccontextmanager
async def service(world: Json) -> AsyncIterator[Json]:
    """A router with the workers of a world. It heeds no knobs of a request, so they come by the environment."""
    from dynamo._core import SelectionService

    knobs = DEFAULT_KNOBS | world.get("knobs", {})
    os.environ.update({KNOB_VARIABLES[knob]: str(value) for knob, value in knobs.items()})
    os.environ["DYN_ROUTER_USE_KV_EVENTS"] = str(world.get("events", True)).lower()
    router = SelectionService(indexer_threads=1)
    try:
        for worker in world["workers"]:
            record = await router.upsert_worker(
                {
                    "worker_id": worker["worker"],
                    "model_name": worker.get("model", "m"),
                    "block_size": worker["block_size"],
                    "endpoint": "http://127.0.0.1:9",
                    "data_parallel_size": worker["ranks"],
                    "kv_events_endpoints": dict.fromkeys(range(worker["ranks"]), worker.get("endpoint", RANK_ENDPOINT)),
                    "taints": worker["labels"],
                }
            )
            if record["lifecycle"] != "schedulable":
                raise RuntimeError(record)
        yield router
    finally:
        await router.shutdown_async()


async def deliver(router: Json, events: list[Json]) -> None:
    """Let the router take KV events in: as the dump of a peer that it recovers from, which can be waited for."""
    dumped = []
    for number, (kind, *operands) in enumerate(events):
        worker, rank, data = event_data(kind, operands)
        event = {"event_id": number, "data": data, "dp_rank": rank}
        dumped.append({"worker_id": worker, "storage_tier": "device", "event": event})
    held = await router.indexer_snapshot()
    body = json.dumps({name: {"block_size": index["block_size"], "events": dumped} for name, index in held.items()})

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close"
        writer.write(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        if not await router.recover_indexer_from_peers([f"http://{host}:{port}"]):
            raise RuntimeError("the events were not taken")
    await router.indexer_snapshot()  # it stands in line behind the events


# --- what engines publish ---------------------------------------------------------------------------------------------

BEGUN, ENDED = 0, 1
"""Tokens of blocks that no program has: once such a block is seen, so is everything published before it."""


def engine_events(programs: list[Json]) -> list[Json]:
    return asyncio.run(hear_engines(programs))


async def hear_engines(programs: list[Json]) -> list[Json]:
    return await asyncio.gather(*map(hear_engine, programs))


async def hear_engine(program: Json) -> list[int]:
    """Publish messages, in hexadecimal, as an engine does, and answer how many leading blocks of each prompt it has."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        endpoint = f"tcp://127.0.0.1:{publisher.bind_to_random_port('tcp://127.0.0.1')}"
        worker = {"worker": 1, "ranks": 1, "labels": [], "block_size": program["block_size"], "endpoint": endpoint}
        async with service({"workers": [worker]}) as router:
            sequence = await publish_until_heard(router, publisher, 0, BEGUN, program["block_size"])
            for message in program["messages"]:
                publisher.send_multipart([b"", sequence.to_bytes(8, "big"), bytes.fromhex(message)])
                sequence += 1
            await publish_until_heard(router, publisher, sequence, ENDED, program["block_size"])
            return [await depth(router, prompt) for prompt in program["prompts"]]


async def publish_until_heard(router: Json, publisher: Json, sequence: int, token: int, block_size: int) -> int:
    """Publish a block until the router knows of it, as whoever has not subscribed yet hears nothing."""
    import msgpack

    tokens = [token] * block_size
    payload = msgpack.packb([0.0, [["BlockStored", [2**62 + token], None, tokens, block_size]], 0])
    while not await depth(router, {"token_ids": tokens}):
        publisher.send_multipart([b"", sequence.to_bytes(8, "big"), payload])
        sequence += 1
        await asyncio.sleep(0.02)
    return sequence


async def depth(router: Json, prompt: Json) -> int:
    answer = await router.overlap_scores({"model_name": "m", **prompt})
    return int(answer["workers"][0]["device_blocks"])


# --- the conversation -------------------------------------------------------------------------------------------------

ANSWERS: dict[str, Callable[[list[Json]], list[Json]]] = {
    "local_hashes": local_hashes,
    "sequence_hashes": sequence_hashes,
    "index_programs": index_programs,
    "worlds": worlds,
    "engine_events": engine_events,
}


def lines() -> Iterator[Json]:
    for line in sys.stdin:
        yield json.loads(line)


def say(answer: Json) -> None:
    sys.stdout.write(json.dumps(answer, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def main() -> None:
    os.environ["DYN_LOG"] = "off"
    try:
        import dynamo._core  # noqa: F401
    except ImportError:
        say(None)
        return
    say(version("ai-dynamo-runtime"))
    for question in lines():
        say(ANSWERS[question["ask"]](question["cases"]))


if __name__ == "__main__":
    main()
