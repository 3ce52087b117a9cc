from kvmesh.core.ids import WorkerId, WorkerRank
from kvmesh.core.rank_bits import RankBits, bit_numbers

A, B, C = (WorkerRank(WorkerId(name)) for name in "abc")


def test_every_rank_has_a_bit_of_its_own() -> None:
    bits = RankBits()

    masks = [bits.join(worker) for worker in (A, B, C)]

    assert [mask.bit_count() for mask in masks] == [1, 1, 1]
    assert len(set(masks)) == 3
    assert bits.alive == sum(masks)
    assert bits.ranks_of(masks[0] | masks[2]) == (A, C)
    bits.check_integrity()


def test_a_bit_that_marked_something_returns_only_after_it_was_wiped() -> None:
    bits = RankBits()
    marked = bits.join(A)

    bits.retire(marked, is_marked=True)

    assert bits.join(B) != marked
    assert bits.begin_wipe() == marked
    assert bits.begin_wipe() == 0
    assert bits.join(C) != marked
    bits.free(marked)
    assert bits.join(A) == marked
    bits.check_integrity()


def test_a_bit_that_marked_nothing_returns_at_once() -> None:
    bits = RankBits()
    mask = bits.join(A)

    bits.retire(mask, is_marked=False)

    assert (bits.alive, bits.begin_wipe()) == (0, 0)
    assert bits.join(B) == mask
    assert bits.ranks_of(mask) == (B,)
    bits.check_integrity()


def test_the_version_tells_that_bits_changed() -> None:
    bits = RankBits()
    versions = [bits.version]

    mask = bits.join(A)
    versions.append(bits.version)
    bits.retire(mask, is_marked=True)
    versions.append(bits.version)
    bits.free(bits.begin_wipe())

    assert versions == sorted(set(versions))
    assert bits.version == versions[-1]


def test_bit_numbers_are_those_of_a_mask_from_the_lowest() -> None:
    assert list(bit_numbers(0)) == []
    assert list(bit_numbers(1 | 1 << 3 | 1 << 200)) == [0, 3, 200]
