"""What the simulated engine says: output tokens as a pure function of prompt, seed and position, never of the batch."""

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from kvmesh.engines.simulated_options import SimulatedOptions

CHUNK_TOKENS = 256
"""Output positions drawn at once: numpy's overhead is paid once for all of them."""

_U64_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
"""Step of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)."""
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_STEPS = np.arange(1, CHUNK_TOKENS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)


class OutputTokens:
    """Draws the output of every request of one engine: SplitMix64, started from the prompt, at the token's position."""

    def __init__(self, options: SimulatedOptions) -> None:
        """Lay out the ids to draw from."""
        ids = options.output_token_ids or np.setdiff1d(np.arange(options.vocab_size), options.eos_token_ids)
        self._ids = np.asarray(ids, dtype=np.uint32)
        self._count = np.uint64(len(self._ids))
        self._eos_rate = options.eos_rate
        self._eos_token_ids = options.eos_token_ids

    @property
    def end_token(self) -> int:
        """The token that says that a sequence ended by itself; only where `ending` may find an end."""
        return self._eos_token_ids[0]

    def start(self, prompt: npt.NDArray[np.uint32], seed: int | None) -> int:
        """Return the u64 state from which a prompt's output is drawn; a seed of None differs from every seed."""
        state = xxh3_64_intdigest(np.ascontiguousarray(prompt, dtype="<u4").data)
        if seed is None:
            return state
        return xxh3_64_intdigest(f"{state}:{seed}".encode())

    def chunk(self, start: int, position: int) -> list[int]:
        """Return the tokens at `position .. position + CHUNK_TOKENS - 1`."""
        drawn = self._draw(start, position)
        tokens: list[int] = self._ids[drawn % self._count].tolist()
        return tokens

    def ending(self, start: int, position: int) -> int | None:
        """Return the first position of the same chunk at which the sequence ends by itself, if any."""
        if not self._eos_rate:
            return None
        fractions = (self._draw(start ^ _GOLDEN, position) >> np.uint64(11)) * 2.0**-53
        ends = np.flatnonzero(fractions < self._eos_rate)
        return position + int(ends[0]) if len(ends) else None

    @staticmethod
    def _draw(start: int, position: int) -> npt.NDArray[np.uint64]:
        mixed = _STEPS + np.uint64((start + position * _GOLDEN) & _U64_MASK)
        mixed ^= mixed >> np.uint64(30)
        mixed *= _MIX_1
        mixed ^= mixed >> np.uint64(27)
        mixed *= _MIX_2
        mixed ^= mixed >> np.uint64(31)
        return mixed
