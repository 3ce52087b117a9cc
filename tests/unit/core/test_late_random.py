import random

import pytest

from kvmesh.core.late_random import LateRandom


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_draws_are_those_of_a_generator_seeded_at_once(seed: int) -> None:
    late, plain = LateRandom(), random.Random(seed)
    late.seed_late(seed)

    drawn = [late.random(), late.randrange(1000), late.choice("abcdef"), late.gauss(0, 1), *late.choices(range(9), k=3)]

    assert drawn == [
        plain.random(),
        plain.randrange(1000),
        plain.choice("abcdef"),
        plain.gauss(0, 1),
        *plain.choices(range(9), k=3),
    ]


def test_a_new_seed_starts_anew_whatever_was_drawn_before() -> None:
    late = LateRandom()
    late.seed_late(5)
    first = [late.gauss(0, 1), late.random()]

    late.seed_late(6)
    late.seed_late(5)

    assert [late.gauss(0, 1), late.random()] == first


def test_state_can_be_kept_and_taken_up_again() -> None:
    late = LateRandom()
    late.seed_late(5)
    state = late.getstate()
    first = late.random()
    late.seed_late(6)

    late.setstate(state)

    assert late.random() == first == random.Random(5).random()
