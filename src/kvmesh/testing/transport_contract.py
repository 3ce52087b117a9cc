"""What every Transport must do: subclass it in a test module and give it `source` and `target` fixtures."""

import asyncio

import numpy as np
import numpy.typing as npt
import pytest

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.transports.transport import Transport

BLOCKS = 8
BLOCK_BYTES = 256
AGENT = "node/prefill/0@1"
GENEROUS_S = 20.0


def make_pool(fill: int, *, blocks: int = BLOCKS, block_bytes: int = BLOCK_BYTES) -> npt.NDArray[np.uint8]:
    """Return a pool, shape (blocks, block_bytes), whose block i holds the byte `fill + i` all over."""
    pool = np.empty((blocks, block_bytes), dtype=np.uint8)
    pool[:] = (fill + np.arange(blocks, dtype=np.uint32) % 64)[:, np.newaxis]
    return pool


def allocate_pool(
    transport: Transport, fill: int, *, blocks: int = BLOCKS, block_bytes: int = BLOCK_BYTES
) -> npt.NDArray[np.uint8]:
    """Return a pool as `make_pool` does, in memory that `transport` can serve."""
    pool = transport.allocate(blocks, block_bytes)
    if pool is None:
        return make_pool(fill, blocks=blocks, block_bytes=block_bytes)
    pool[:] = make_pool(fill, blocks=blocks, block_bytes=block_bytes)
    return pool


class TransportContract:
    """The suite; `source` and `target` are two ends of one kind, fixtures of the subclass and closed by it."""

    async def test_both_ends_have_one_reach(self, source: Transport, target: Transport) -> None:
        """A task names it, and a handoff repeats it."""
        assert source.reach == target.reach
        assert source.reach.split("@")[0] == source.name == target.name

    async def test_blocks_are_pulled_in_order_into_the_places_asked_for(
        self, source: Transport, target: Transport
    ) -> None:
        """Ids on both sides are scattered, as those of real pools are; no other block is touched."""
        served, own = allocate_pool(source, 10), make_pool(100)
        before = own.copy()
        public_name = await source.serve(AGENT, served)

        moved = await target.pull(public_name, source_block_ids=[5, 0, 3], target=own, target_block_ids=[1, 7, 2])

        assert moved == 3 * BLOCK_BYTES
        assert [int(own[block, 0]) for block in (1, 7, 2)] == [15, 10, 13]
        assert (own[[1, 7, 2]] == served[[5, 0, 3]]).all()
        untouched = [0, 3, 4, 5, 6]
        assert (own[untouched] == before[untouched]).all()

    async def test_pull_sees_what_the_source_wrote_after_it_began_to_serve(
        self, source: Transport, target: Transport
    ) -> None:
        """Memory is served, not a copy of it."""
        served, own = allocate_pool(source, 10), make_pool(100)
        public_name = await source.serve(AGENT, served)
        served[4] = 77

        await target.pull(public_name, source_block_ids=[4], target=own, target_block_ids=[0])

        assert (own[0] == 77).all()

    async def test_source_is_not_changed(self, source: Transport, target: Transport) -> None:
        """Serving pulls: nobody writes into a pool but its owner."""
        served, own = allocate_pool(source, 10), make_pool(100)
        public_name = await source.serve(AGENT, served)

        await target.pull(public_name, source_block_ids=[1, 2], target=own, target_block_ids=[3, 4])

        assert (served == make_pool(10)).all()

    async def test_no_block_is_a_pull_of_nothing(self, source: Transport, target: Transport) -> None:
        """It moves no bytes and is no error."""
        own = make_pool(100)
        public_name = await source.serve(AGENT, allocate_pool(source, 10))

        moved = await target.pull(public_name, source_block_ids=[], target=own, target_block_ids=[])

        assert moved == 0
        assert (own == make_pool(100)).all()

    async def test_large_pull_arrives_whole(self, source: Transport, target: Transport) -> None:
        """Megabytes take another way than kilobytes in more than one transport."""
        served = allocate_pool(source, 10, blocks=64, block_bytes=65_536)
        own = np.zeros_like(served)
        public_name = await source.serve(AGENT, served)
        ids = list(range(64))

        moved = await target.pull(public_name, source_block_ids=ids, target=own, target_block_ids=ids[::-1])

        assert moved == served.nbytes
        assert (own[::-1] == served).all()

    async def test_cancelled_pull_writes_nothing_once_it_has_returned(
        self, source: Transport, target: Transport
    ) -> None:
        """Its blocks are somebody else's from then on; two cancellations are as good as one."""
        served = allocate_pool(source, 10, blocks=64, block_bytes=1 << 20)
        own = np.zeros_like(served)
        public_name = await source.serve(AGENT, served)
        ids = list(range(64))

        pulling = asyncio.ensure_future(
            target.pull(public_name, source_block_ids=ids, target=own, target_block_ids=ids)
        )
        await asyncio.sleep(0)
        pulling.cancel()
        await asyncio.sleep(0)
        pulling.cancel()
        await asyncio.wait([pulling], timeout=GENEROUS_S)
        own[:] = 0
        await target.pull(public_name, source_block_ids=[0], target=own, target_block_ids=[0])

        assert pulling.done()
        assert not own[1:].any()

    async def test_unknown_source_is_refused(self, source: Transport, target: Transport) -> None:
        """As after the holder's end, or before its beginning."""
        own = make_pool(100)
        public_name = await source.serve(AGENT, allocate_pool(source, 10))

        await _refused(target, public_name.replace("prefill/0", "prefill/1"), own)

        assert (own == make_pool(100)).all()

    async def test_source_that_was_closed_is_gone(self, source: Transport, target: Transport) -> None:
        """A close takes effect at once, and may be repeated."""
        public_name = await source.serve(AGENT, allocate_pool(source, 10))
        await source.aclose()
        await source.aclose()

        await _refused(target, public_name, make_pool(100))

    async def test_later_incarnation_does_not_answer_for_the_earlier(
        self, source: Transport, target: Transport
    ) -> None:
        """Agent names carry the epoch: an old handoff is void."""
        public_name = await source.serve("node/prefill/0@2", allocate_pool(source, 10))

        await _refused(target, public_name.replace("prefill/0@2", "prefill/0@1"), make_pool(100))

    @pytest.mark.parametrize(
        "name", ["", "nobody", "@", "a@b@c", "a@b:c", "../x@1", "a\0@b", "x" * 5000, "a@[:1", "a@:0"]
    )
    async def test_name_that_no_transport_made_is_refused(self, target: Transport, name: str) -> None:
        """A handoff is a stranger's word."""
        own = make_pool(100)

        await _refused(target, name, own)

        assert (own == make_pool(100)).all()

    async def test_allocated_pool_begins_zeroed(self, source: Transport) -> None:
        """Pools are made for the most that a worker may ever hold."""
        pool = source.allocate(1 << 16, 4096)

        if pool is not None:
            assert pool.shape == (1 << 16, 4096)
            assert pool.dtype == np.uint8
            assert not pool[[0, 1 << 15, -1]].any()

    async def test_several_pullers_at_once_get_what_each_asked_for(self, source: Transport, target: Transport) -> None:
        """A decode worker fetches for many requests."""
        served = allocate_pool(source, 10, blocks=64, block_bytes=8192)
        public_name = await source.serve(AGENT, served)
        pools = [np.zeros_like(make_pool(0, blocks=64, block_bytes=8192)) for _ in range(12)]
        wanted = [list(range(at, 64, 3)) for at in range(12)]

        async with asyncio.timeout(GENEROUS_S):
            await asyncio.gather(
                *(
                    target.pull(public_name, source_block_ids=ids, target=pool, target_block_ids=ids)
                    for ids, pool in zip(wanted, pools, strict=True)
                )
            )

        for ids, pool in zip(wanted, pools, strict=True):
            others = sorted(set(range(64)) - set(ids))
            assert (pool[ids] == served[ids]).all()
            assert not pool[others].any()

    async def test_runs_of_every_length_arrive_in_order(self, source: Transport, target: Transport) -> None:
        """Consecutive blocks may be moved in one go, on either side; what is asked for twice comes twice."""
        served = allocate_pool(source, 10, blocks=64, block_bytes=16_384)
        own = np.zeros_like(make_pool(0, blocks=64, block_bytes=16_384))
        public_name = await source.serve(AGENT, served)
        source_ids = [*range(40, 60), 3, 9, 8, 7, 3, *range(10, 13), 63]
        target_ids = [0, 2, 4, *range(20, 40), 63, 61, *range(44, 48)]

        await target.pull(public_name, source_block_ids=source_ids, target=own, target_block_ids=target_ids)

        assert (own[target_ids] == served[source_ids]).all()
        assert not own[sorted(set(range(64)) - set(target_ids))].any()

    @pytest.mark.parametrize("block", [BLOCKS, -1])
    async def test_block_that_the_source_does_not_have_is_refused(
        self, source: Transport, target: Transport, block: int
    ) -> None:
        """A handoff is a stranger's word."""
        own = make_pool(100)
        public_name = await source.serve(AGENT, allocate_pool(source, 10))

        await _refused(target, public_name, own, source_block_ids=[block])

        assert (own == make_pool(100)).all()

    async def test_ids_that_do_not_pair_are_refused(self, source: Transport, target: Transport) -> None:
        """One block is never written to two places, nor two to one."""
        own = make_pool(100)
        public_name = await source.serve(AGENT, allocate_pool(source, 10))

        await _refused(target, public_name, own, source_block_ids=[0, 1])

        assert (own == make_pool(100)).all()

    async def test_blocks_of_another_size_are_refused(self, source: Transport, target: Transport) -> None:
        """Layouts are compared before; this is the second lock."""
        own = make_pool(100, block_bytes=BLOCK_BYTES * 2)
        public_name = await source.serve(AGENT, allocate_pool(source, 10))

        await _refused(target, public_name, own)

        assert (own == make_pool(100, block_bytes=BLOCK_BYTES * 2)).all()


async def _refused(
    target: Transport, agent_name: str, own: npt.NDArray[np.uint8], *, source_block_ids: list[int] | None = None
) -> None:
    with pytest.raises(TryElsewhereError) as caught:
        await target.pull(agent_name, source_block_ids=source_block_ids or [0], target=own, target_block_ids=[0])
    assert caught.value.reason is Reason.KV_TRANSFER_FAILED
