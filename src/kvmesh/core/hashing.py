"""Block identity: the two hashes by which every index, event and task names a block of KV cache.

    local[i]    = xxh3_64(LE u32 tokens of full block i [+ LE u64 multimodal hashes, sorted], seed)
    seed        = 1337 [+ xxh3_64(lora, seed 0)] [+ xxh3_64(cache_namespace, seed 1)]   mod 2^64
    sequence[0] = local[0];   sequence[i] = xxh3_64(LE u64 sequence[i-1] || LE u64 local[i], seed 1337)

These are the hashes of Dynamo's KV router, so that indexes and events interoperate. A partial last block has none.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, repeat
from typing import cast

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.ids import LocalHash, SequenceHash

_SEED = 1337
_LORA_SEED = 0
_NAMESPACE_SEED = 1
_U64_MASK = 2**64 - 1
_TOKEN_BYTES = 4
_pack_link = struct.Struct("<QQ").pack


def local_block_hashes(
    tokens: NDArray[np.uint32],
    block_size: int,
    *,
    lora: str | None = None,
    cache_namespace: str | None = None,
    multimodal: Mapping[int, Sequence[int]] | None = None,
) -> tuple[LocalHash, ...]:
    """Hash every full block of `tokens`; see `local_block_hash_array`."""
    hashes = local_block_hash_array(
        tokens, block_size, lora=lora, cache_namespace=cache_namespace, multimodal=multimodal
    )
    return cast("tuple[LocalHash, ...]", tuple(hashes.tolist()))


def local_block_hash_array(
    tokens: NDArray[np.uint32],
    block_size: int,
    *,
    lora: str | None = None,
    cache_namespace: str | None = None,
    multimodal: Mapping[int, Sequence[int]] | None = None,
) -> NDArray[np.uint64]:
    """Hash every full block of `tokens`, shape (prompt_tokens,); none if `block_size` <= 0.

    `multimodal` maps a block's index to the u64 hashes of what it shows, in any order; those of a block that is not
    full are ignored. An empty `lora` or `cache_namespace` is none. Copies nothing if `tokens` is contiguous.

    Raises:
        FixRequestError: INVALID_FIELD, naming the argument.
    """
    if not isinstance(tokens, np.ndarray) or tokens.dtype.kind != "u" or tokens.dtype.itemsize != _TOKEN_BYTES:
        raise _invalid("tokens", "must be a numpy array of uint32")
    if tokens.ndim != 1:
        raise _invalid("tokens", f"must have one dimension, has {tokens.ndim}")
    if block_size <= 0 or len(tokens) < block_size:
        return np.empty(0, dtype=np.uint64)

    seed = _seed(lora, cache_namespace)
    stride = block_size * _TOKEN_BYTES
    count = len(tokens) // block_size
    full = np.ascontiguousarray(tokens[: count * block_size], dtype="<u4")
    # Opaque items of one block each: numpy cuts bytes from them several times faster than slicing does.
    contents: list[bytes] = full.view(f"V{stride}").tolist()
    hashes = np.fromiter(map(xxh3_64_intdigest, contents, repeat(seed)), dtype=np.uint64, count=count)
    for index, extra in (multimodal or {}).items():
        if index < 0:
            raise _invalid("multimodal", f"block index {index} is negative")
        content = _u64_bytes("multimodal", sorted(extra))
        if index < count and content:
            hashes[index] = xxh3_64_intdigest(contents[index] + content, seed)
    return hashes


def sequence_hashes(local: Sequence[int]) -> tuple[SequenceHash, ...]:
    """Chain local hashes; serial by definition, so keep it off the hot path where a local hash will do.

    Raises:
        FixRequestError: INVALID_FIELD `local` if a value is no u64.
    """
    _u64_bytes("local", local)
    chain: list[SequenceHash] = []
    chain_on(chain, local)
    return tuple(chain)


def chain_on(chain: list[SequenceHash], local: Iterable[int]) -> None:
    """Append to a sequence's hashes those of its next blocks, whose local hashes must be u64."""
    blocks = iter(local)
    if not chain:
        chain += [SequenceHash(int(block)) for block in islice(blocks, 1)]
    previous: int = chain[-1] if chain else 0
    for block in blocks:
        previous = xxh3_64_intdigest(_pack_link(previous, block), _SEED)
        chain.append(previous)  # type: ignore[arg-type]  # SequenceHash() of each would cost a sixth of the time


def u64_array(field: str, values: Sequence[int]) -> NDArray[np.uint64]:
    """Return `values` as an array, shape (values,). Raises: FixRequestError(INVALID_FIELD) if one is no u64."""
    return np.frombuffer(_u64_bytes(field, values), dtype="<u8").astype(np.uint64, copy=False)


def max_overlap_blocks(prompt_tokens: int, block_size: int) -> int:
    """Count the blocks that may count as overlap: at least one token of a prompt is always computed."""
    if prompt_tokens <= 0 or block_size <= 0:
        return 0
    return (prompt_tokens - 1) // block_size


def text_tokens(text: str) -> NDArray[np.uint32]:
    """Return the UTF-8 bytes of `text` as tokens, shape (bytes,): the identity of prompts of TEXT workers.

    Raises:
        FixRequestError: INVALID_FIELD `text` if it has a lone surrogate.
    """
    return np.frombuffer(_utf8("text", text), dtype=np.uint8).astype(np.uint32)


def require_block_size(block_size: int) -> None:
    """Refuse a stored event, or a worker's record, whose blocks hold no tokens.

    Raises:
        FixRequestError: INVALID_FIELD `block_size`.
    """
    if block_size <= 0:
        raise _invalid("block_size", f"must be at least 1, is {block_size}")


def _seed(lora: str | None, cache_namespace: str | None) -> int:
    seed = _SEED
    if lora:
        seed += xxh3_64_intdigest(_utf8("lora", lora), _LORA_SEED)
    if cache_namespace:
        seed += xxh3_64_intdigest(_utf8("cache_namespace", cache_namespace), _NAMESPACE_SEED)
    return seed & _U64_MASK


def _u64_bytes(field: str, values: Sequence[int]) -> bytes:
    try:
        return struct.pack(f"<{len(values)}Q", *values)
    except struct.error as exc:
        raise _invalid(field, "must hold integers in [0, 2^64)") from exc


def _utf8(field: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise _invalid(field, "is not valid Unicode text") from exc


def _invalid(field: str, why: str) -> FixRequestError:
    return FixRequestError(Reason.INVALID_FIELD, f"{field} {why}", field=field)
