"""Block identity: the two hashes by which every index, event and task names a block of KV cache.

    local[i]    = xxh3_64(LE u32 tokens of full block i [+ LE u64 multimodal hashes, sorted], seed)
    seed        = 1337 [+ xxh3_64(lora, seed 0)] [+ xxh3_64(cache_namespace, seed 1)]   mod 2^64
    sequence[0] = local[0];   sequence[i] = xxh3_64(LE u64 sequence[i-1] || LE u64 local[i], seed 1337)

These are the hashes of Dynamo's KV router, so that indexes and events interoperate. A partial last block has none.
"""

import struct
from collections.abc import Mapping, Sequence

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
        return ()

    seed = _seed(lora, cache_namespace)
    stride = block_size * _TOKEN_BYTES
    view = np.ascontiguousarray(tokens, dtype="<u4").data.cast("B")
    starts = range(0, len(view) - stride + 1, stride)
    hashes = [LocalHash(xxh3_64_intdigest(view[start : start + stride], seed)) for start in starts]
    for index, extra in (multimodal or {}).items():
        if index < 0:
            raise _invalid("multimodal", f"block index {index} is negative")
        content = _u64_bytes("multimodal", sorted(extra))
        if index < len(hashes) and content:
            hashes[index] = LocalHash(xxh3_64_intdigest(bytes(view[starts[index] :][:stride]) + content, seed))
    return tuple(hashes)


def sequence_hashes(local: Sequence[int]) -> tuple[SequenceHash, ...]:
    """Chain local hashes; serial by definition, so keep it off the hot path where a local hash will do.

    Raises:
        FixRequestError: INVALID_FIELD `local` if a value is no u64.
    """
    _u64_bytes("local", local)
    chain: list[SequenceHash] = []
    previous = 0
    for block in local:
        previous = xxh3_64_intdigest(_pack_link(previous, block), _SEED) if chain else int(block)
        chain.append(SequenceHash(previous))
    return tuple(chain)


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
