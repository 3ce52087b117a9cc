"""The full blocks of one prompt, named in every way that someone asks for, each made when first asked for.

Whatever reads a tuple of sequence hashes reads this. Chaining those is serial and slow, so what is on the path of a
request goes by `keys` instead, wherever the local hashes are known.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import cast, overload

import numpy as np
from numpy.typing import NDArray

from kvmesh.core.hashing import chain_on, local_block_hash_array, u64_array
from kvmesh.core.ids import LocalHash, SequenceHash
from kvmesh.core.prefix_keys import prefix_keys


class PromptBlocks(Sequence[SequenceHash]):
    """The sequence hashes of a prompt's full blocks; equal to their tuple, and with its hash. Made by `of_*`."""

    __slots__ = ("_chain", "_key_array", "_key_view", "_keys", "_local", "_local_array", "block_size")

    def __init__(
        self, local: NDArray[np.uint64] | None, sequence: tuple[SequenceHash, ...] | None, block_size: int
    ) -> None:
        """Take local hashes or sequence hashes; use `of_tokens`, `of_local` or `of_sequence`."""
        assert (local is None) != (sequence is None)
        self.block_size = block_size
        self._local_array = local
        self._local: tuple[LocalHash, ...] | None = None
        self._chain = list(sequence or ())
        self._key_array: NDArray[np.uint64] | None = None
        self._key_view: Sequence[int] | None = None
        self._keys: list[int] | None = None

    @classmethod
    def of_tokens(
        cls,
        tokens: NDArray[np.uint32],
        block_size: int,
        *,
        lora: str | None = None,
        cache_namespace: str | None = None,
        multimodal: Mapping[int, Sequence[int]] | None = None,
    ) -> "PromptBlocks":
        """Hash every full block of `tokens`, as `local_block_hashes` does; `tokens` may change afterwards."""
        local = local_block_hash_array(
            tokens, block_size, lora=lora, cache_namespace=cache_namespace, multimodal=multimodal
        )
        return cls(local, None, block_size)

    @classmethod
    def of_local(cls, local: Sequence[int], block_size: int) -> "PromptBlocks":
        """Take the blocks' local hashes. Raises: FixRequestError(INVALID_FIELD) `local` if a value is no u64."""
        return cls(u64_array("local", local), None, block_size)

    @classmethod
    def of_sequence(cls, hashes: Sequence[int], block_size: int) -> "PromptBlocks":
        """Take the blocks' sequence hashes, where nothing else is known."""
        return cls(None, tuple(map(SequenceHash, hashes)), block_size)

    @property
    def local(self) -> tuple[LocalHash, ...] | None:
        """The local hashes; None where only sequence hashes are known."""
        if self._local is None and self._local_array is not None:
            self._local = cast("tuple[LocalHash, ...]", tuple(self._local_array.tolist()))
        return self._local

    @property
    def keys(self) -> list[int]:
        """Prefix-unique u64 keys: those of `prefix_keys`, or the sequence hashes where only these are known."""
        if self._keys is None:
            keys = self.key_array
            self._keys = keys.tolist() if keys is not None else [*self._chain]
        return self._keys

    @property
    def key_array(self) -> NDArray[np.uint64] | None:
        """The same, shape (blocks,); None where only sequence hashes are known."""
        if self._key_array is None and self._local_array is not None:
            self._key_array = prefix_keys(self._local_array)
        return self._key_array

    @property
    def key_view(self) -> Sequence[int] | None:
        """The same as Python integers made one by one, for who reads a few of them."""
        if self._key_view is None and (keys := self.key_array) is not None:
            self._key_view = keys.data
        return self._key_view

    def __len__(self) -> int:
        return len(self._chain) if self._local_array is None else len(self._local_array)

    @overload
    def __getitem__(self, index: int) -> SequenceHash: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[SequenceHash, ...]: ...
    def __getitem__(self, index: int | slice) -> SequenceHash | tuple[SequenceHash, ...]:
        if isinstance(index, slice):
            return tuple(self._chained(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"{index} is no block of {len(self)}")
        at = index % len(self)
        return self._chained(at + 1)[at]

    def __iter__(self) -> Iterator[SequenceHash]:
        return iter(self._chained(len(self)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PromptBlocks):
            if self._local_array is not None and other._local_array is not None:
                return np.array_equal(self._local_array, other._local_array)
            return list(self) == list(other)
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"PromptBlocks({len(self)} of {self.block_size} tokens)"

    def _chained(self, count: int) -> list[SequenceHash]:
        """Chain until `count` sequence hashes are known."""
        chain = self._chain
        if len(chain) < count and self._local_array is not None:
            chain_on(chain, self._local_array[len(chain) : count].tolist())
        return chain
