"""KV events and load reports: protobuf <-> core."""

from typing import assert_never, cast

from kvmesh.core.ids import Epoch, RouterId, SequenceHash
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored, CacheCleared, KvEvent
from kvmesh.core.load_table import LoadReport, RouterLoad
from kvmesh.v1 import worker_events_pb2
from kvmesh.wire.validation import invalid


def kv_event_to_proto(event: KvEvent, *, block_size: int) -> worker_events_pb2.KvEvent:
    """Return the contract's form of one change of a cache with blocks of `block_size` tokens."""
    match event:
        case BlocksStored(parent, block_hashes, local_hashes):
            stored = worker_events_pb2.KvBlocksStored(
                parent_hash=parent, block_hashes=block_hashes, local_hashes=local_hashes, block_size=block_size
            )
            return worker_events_pb2.KvEvent(stored=stored)
        case BlocksRemoved(block_hashes):
            return worker_events_pb2.KvEvent(removed=worker_events_pb2.KvBlocksRemoved(block_hashes=block_hashes))
        case CacheCleared():
            return worker_events_pb2.KvEvent(cleared=worker_events_pb2.KvCacheCleared())
        case _:
            assert_never(event)


def kv_event_from_proto(event: worker_events_pb2.KvEvent, *, block_size: int) -> KvEvent | None:
    """Return the core's form of one change; None for a kind that this build does not know.

    Raises: FixRequestError(INVALID_FIELD) for stored blocks whose size is not `block_size`, 0 among them, or whose
    local hashes are neither absent nor as many as the blocks.
    """
    match event.WhichOneof("event"):
        case "stored":
            stored = event.stored
            if stored.block_size != block_size:
                raise invalid("stored.block_size", f"{stored.block_size} is not this worker's, which is {block_size}")
            if stored.local_hashes and len(stored.local_hashes) != len(stored.block_hashes):
                raise invalid(
                    "stored.local_hashes", f"{len(stored.local_hashes)} for {len(stored.block_hashes)} blocks"
                )
            parent = SequenceHash(stored.parent_hash) if stored.HasField("parent_hash") else None
            return BlocksStored(parent, _hashes(stored), tuple(stored.local_hashes))
        case "removed":
            return BlocksRemoved(_hashes(event.removed))
        case "cleared":
            return CacheCleared()
        case _:
            return None


def load_reports_from_proto(
    message: worker_events_pb2.WatchLoadResponse, *, received_at: float
) -> dict[int, LoadReport]:
    """Return one worker's report by data-parallel rank; every rank carries all of the router's reservations."""
    reservation_ids = frozenset(message.reservation_ids)
    return {
        load.rank: LoadReport(
            epoch=Epoch(message.epoch),
            sequence=message.sequence,
            received_at=received_at,
            active_requests=load.active_requests,
            max_requests=load.max_requests,
            active_blocks=load.active_blocks,
            total_blocks=load.total_blocks,
            waiting_requests=load.waiting_requests,
            cache_usage=load.cache_usage,
            prefix_hit_rate=load.prefix_hit_rate,
            per_router={RouterId(share.router_id): _share(share) for share in load.shares if share.router_id},
            unrouted=sum((_share(share) for share in load.shares if not share.router_id), start=RouterLoad()),
            reservation_ids=reservation_ids,
        )
        for load in message.ranks
    }


def _hashes(blocks: worker_events_pb2.KvBlocksStored | worker_events_pb2.KvBlocksRemoved) -> tuple[SequenceHash, ...]:
    return cast("tuple[SequenceHash, ...]", tuple(blocks.block_hashes))  # no call per block: there are many


def _share(share: worker_events_pb2.RouterShare) -> RouterLoad:
    return RouterLoad(share.active_requests, share.prefill_tokens, share.decode_blocks)
