"""Pins and imports: every claim ends exactly once, and gives back what it took."""

import pytest

from kvmesh.core.block_claims import BlockClaims, Import, Pin
from kvmesh.core.block_pool import BlockPool
from kvmesh.core.errors import BackOffError, FixRequestError, NotKnownError, Reason, TryElsewhereError
from kvmesh.core.ids import SequenceHash
from kvmesh.core.kv_events import BlocksRemoved, BlocksStored

A, B, C, X = (SequenceHash(number) for number in (1, 2, 3, 9))
CHAIN = (A, B, C)
LOCALS = (101, 102, 103)


def imported(claims: BlockClaims, chain: tuple[SequenceHash, ...] = CHAIN) -> Pin:
    opened = claims.begin_import(chain, first_block=0)
    return claims.commit_import(opened.import_id, chain, local_hashes=LOCALS[: len(chain)])


def test_committed_import_is_pinned_cache() -> None:
    pool = BlockPool(4)
    claims = BlockClaims(pool)
    opened = claims.begin_import(CHAIN, first_block=0)
    before = pool.cached_prefix(CHAIN), claims.imports, pool.active_blocks
    pin = claims.commit_import(opened.import_id, CHAIN, local_hashes=LOCALS)

    assert before == (0, 1, 3)
    assert (pin.block_ids, pin.block_hashes) == (opened.block_ids, CHAIN)
    assert (claims.imports, claims.pins, claims.pinned_blocks, pool.cached_prefix(CHAIN)) == (0, 1, 3, 3)
    assert pool.drain_events() == (BlocksStored(None, CHAIN, LOCALS),)
    claims.check_integrity()


def test_pin_holds_the_cached_prefix_only() -> None:
    pool = BlockPool(4)
    claims = BlockClaims(pool)
    claims.unpin(imported(claims, (A, B)).pin_id)

    pin = claims.pin_prefix((A, B, X))

    assert pin.block_hashes == (A, B)
    assert len(pin.block_ids) == pool.active_blocks == 2


def test_pins_of_nothing_are_pins() -> None:
    claims = BlockClaims(BlockPool(0))
    pin = claims.pin_prefix(CHAIN)

    assert (pin.block_ids, pin.block_hashes, claims.pins) == ((), (), 1)
    claims.unpin(pin.pin_id)
    assert claims.pins == 0


def test_shared_blocks_are_counted_once_among_pins() -> None:
    claims = BlockClaims(BlockPool(4))
    imported(claims)
    claims.pin_prefix((A, B))

    assert (claims.pins, claims.pinned_blocks) == (2, 3)


def test_pin_is_given_back_exactly_once() -> None:
    pool = BlockPool(4)
    claims = BlockClaims(pool)
    pin = imported(claims)
    claims.unpin(pin.pin_id)

    with pytest.raises(NotKnownError) as caught:
        claims.unpin(pin.pin_id)

    assert caught.value.reason is Reason.NOT_FOUND
    assert (pool.active_blocks, pool.cached_blocks) == (0, 3)
    claims.check_integrity()


def test_ids_of_pins_and_imports_are_never_reused() -> None:
    claims = BlockClaims(BlockPool(4))
    first = claims.pin_prefix(())
    claims.unpin(first.pin_id)
    opened = claims.begin_import((A,), first_block=0)
    claims.abort_import(opened.import_id)
    last = claims.pin_prefix(())

    assert len({first.pin_id, opened.import_id, last.pin_id}) == 3


def test_import_takes_the_blocks_after_the_first_and_evicts_for_them() -> None:
    pool = BlockPool(3)
    claims = BlockClaims(pool)
    claims.unpin(imported(claims, (X,)).pin_id)
    head = imported(claims, (A,))
    pool.drain_events()

    opened = claims.begin_import(CHAIN, first_block=1)
    evicted = pool.drain_events()
    pin = claims.commit_import(opened.import_id, CHAIN, local_hashes=LOCALS)

    assert (opened.first_block, opened.block_hashes) == (1, (B, C))
    assert evicted == (BlocksRemoved((X,)),)
    assert pin.block_ids == head.block_ids + opened.block_ids
    assert pool.drain_events() == (BlocksStored(A, (B, C), (102, 103)),)
    claims.check_integrity()


def test_block_that_was_cached_meanwhile_takes_the_place_of_the_imported_one() -> None:
    pool = BlockPool(6)
    claims = BlockClaims(pool)
    opened = claims.begin_import(CHAIN, first_block=0)
    computed = imported(claims)

    pin = claims.commit_import(opened.import_id, CHAIN, local_hashes=LOCALS)

    assert pin.block_ids == computed.block_ids
    assert (pool.active_blocks, pool.cached_blocks) == (3, 3)
    claims.check_integrity()


def test_aborted_import_frees_its_blocks_once() -> None:
    pool = BlockPool(3)
    claims = BlockClaims(pool)
    opened = claims.begin_import(CHAIN, first_block=0)
    claims.abort_import(opened.import_id)

    with pytest.raises(NotKnownError):
        claims.abort_import(opened.import_id)

    assert (pool.available_blocks, claims.imports) == (3, 0)


@pytest.mark.parametrize("first_block", [-1, 4])
def test_first_block_outside_of_the_sequence_is_refused(first_block: int) -> None:
    pool = BlockPool(3)
    claims = BlockClaims(pool)

    with pytest.raises(FixRequestError) as caught:
        claims.begin_import(CHAIN, first_block=first_block)

    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "first_block")
    assert (pool.active_blocks, claims.imports) == (0, 0)


@pytest.mark.parametrize(
    ("total", "reserved", "fits"),
    [
        pytest.param(3, 0, True, id="exactly"),
        pytest.param(2, 0, False, id="one too few"),
        pytest.param(4, 1, True, id="the reserve is left"),
        pytest.param(3, 1, False, id="into the reserve"),
        pytest.param(0, 1, False, id="no pool"),
    ],
)
def test_import_leaves_the_reserve(total: int, reserved: int, fits: bool) -> None:
    pool = BlockPool(total)
    claims = BlockClaims(pool, reserved_blocks=reserved)
    opened: Import | None = None
    error: BackOffError | None = None

    try:
        opened = claims.begin_import(CHAIN, first_block=0)
    except BackOffError as caught:
        error = caught

    assert (opened is not None) is fits
    if error is not None:
        assert error.reason is Reason.OVERLOADED
        assert error.retry_after_s
        assert pool.active_blocks == 0


def test_import_of_another_sequence_is_refused_and_aborted() -> None:
    pool = BlockPool(3)
    claims = BlockClaims(pool)
    opened = claims.begin_import((A, B), first_block=0)

    with pytest.raises(TryElsewhereError) as caught:
        claims.commit_import(opened.import_id, (A, X), local_hashes=LOCALS[:2])

    assert caught.value.reason is Reason.KV_TRANSFER_FAILED
    assert (pool.active_blocks, pool.cached_blocks, claims.imports, claims.pins) == (0, 0, 0, 0)


def test_import_whose_prefix_is_gone_is_refused_and_aborted() -> None:
    pool = BlockPool(4)
    claims = BlockClaims(pool)
    head = imported(claims, (A, B))
    opened = claims.begin_import(CHAIN, first_block=2)
    claims.unpin(head.pin_id)
    taken = pool.allocate(2)  # evicts B
    assert taken is not None

    with pytest.raises(TryElsewhereError) as caught:
        claims.commit_import(opened.import_id, CHAIN, local_hashes=LOCALS)

    assert caught.value.reason is Reason.KV_TRANSFER_FAILED
    assert (pool.cached_prefix(CHAIN), claims.imports, claims.pins) == (1, 0, 0)
    assert pool.active_blocks == len(taken)
    claims.check_integrity()
