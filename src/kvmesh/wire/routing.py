"""What routers are asked: protobuf -> core. What they answer is in `kvmesh.wire.routing_answers`."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvmesh.core.admission import DEFAULT_PRIORITY
from kvmesh.core.candidates import CostOverrides, RoutingHints, RoutingQuery
from kvmesh.core.errors import FixRequestError, Reason
from kvmesh.core.hashing import text_tokens
from kvmesh.core.ids import AttemptKey, RequestId, WorkerId
from kvmesh.core.prompt_blocks import PromptBlocks
from kvmesh.v1 import generation_pb2, router_pb2
from kvmesh.wire.validation import MAX_CLIENT_ID_BYTES, check_hints, invalid

_TOKEN_BYTES = 4
_MAX_PROMPT_TOKENS = 1 << 24
"""Beyond any model's context: a number that nobody counted."""
_TOKEN_FORMS = ("token_ids", "packed_token_ids")
_MAX_OUTPUT_BLOCKS = 2**20
"""In one line of a report: a million tokens in blocks of one. Nothing produces as much within 100 ms."""
_NO_HINTS = RoutingHints(priority=DEFAULT_PRIORITY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How one reservation went on since the report before."""

    key: AttemptKey
    accepted_load_sequence: int | None = None
    """The worker's, from its acknowledgement; None = nothing new."""
    prefill_complete: bool = False
    output_blocks: int = 0
    """Blocks of output since the last report."""


def query_from_proto(
    query: router_pb2.RoutingQuery, *, block_sizes: Collection[int], path: str = "query"
) -> RoutingQuery:
    """Return the core's form of a query, the prompt hashed for each of `block_sizes`, those of the model's workers.

    Raises: FixRequestError(EMPTY_PROMPT or INVALID_FIELD) naming the field under `path`.
    """
    if not query.model:
        raise invalid(f"{path}.model", "required")
    has_hints = query.HasField("hints")
    if has_hints:
        check_hints(query.hints, path=f"{path}.hints")
    prompt_tokens, block_hashes = _prompt(query, block_sizes, path)
    return RoutingQuery(
        model=query.model,
        prompt_tokens=prompt_tokens,
        block_hashes=block_hashes,
        prompt_text=query.prompt_text or query.text or None,
        lora=query.hints.lora or None,
        cache_namespace=query.hints.cache_namespace or None,
        hints=hints_from_proto(query.hints) if has_hints else _NO_HINTS,
        expected_output_tokens=query.expected_output_tokens or None,
    )


def query_to_proto(query: RoutingQuery) -> router_pb2.RoutingQuery:
    """Return the contract's form of a query. Of hashes for several block sizes only the smallest size's travel."""
    message = router_pb2.RoutingQuery(
        model=query.model,
        prompt_tokens=query.prompt_tokens,
        expected_output_tokens=query.expected_output_tokens or 0,
        hints=_hints_to_proto(query),
        prompt_text=query.prompt_text or "",
    )
    size = min(query.block_hashes, default=0)
    if size:
        message.block_hashes.block_size = size
        blocks = query.block_hashes[size]
        local = blocks.local if isinstance(blocks, PromptBlocks) else None
        if local is not None:
            message.block_hashes.local_hashes.extend(local)
        else:
            message.block_hashes.sequence_hashes.extend(blocks)
    return message


def progress_to_proto(progress: Progress) -> router_pb2.ReservationProgress:
    """Return the contract's form of one line of a report."""
    return router_pb2.ReservationProgress(
        request_id=progress.key.request_id,
        attempt=progress.key.attempt,
        accepted_load_sequence=progress.accepted_load_sequence,
        prefill_complete=progress.prefill_complete,
        output_blocks=progress.output_blocks,
    )


def block_hashes_by_size(
    tokens: NDArray[np.uint32],
    block_sizes: Collection[int],
    hints: generation_pb2.RoutingHints,
    multimodal: Iterable[router_pb2.MultimodalSpan] = (),
) -> dict[int, PromptBlocks]:
    """Hash a prompt's full blocks for each block size; `hints` name the LoRA and the cache namespace."""
    spans = tuple(multimodal)
    return {
        size: PromptBlocks.of_tokens(
            tokens,
            size,
            lora=hints.lora,
            cache_namespace=hints.cache_namespace,
            multimodal=_contents_by_block(spans, size) if spans else None,
        )
        for size in block_sizes
    }


def _contents_by_block(spans: Iterable[router_pb2.MultimodalSpan], block_size: int) -> dict[int, list[int]]:
    """Return what each block shows, a part of it being enough."""
    contents: dict[int, list[int]] = {}
    for span in spans:
        last_token = span.first_token + span.token_count - 1
        for block in range(span.first_token // block_size, last_token // block_size + 1):
            contents.setdefault(block, []).append(span.content_hash)
    return contents


def hints_from_proto(hints: generation_pb2.RoutingHints) -> RoutingHints:
    """Return the core's form of hints that `check_hints` has passed."""
    cost = hints.cost
    return RoutingHints(
        pinned_worker=WorkerId(hints.pinned_worker_id) if hints.pinned_worker_id else None,
        pinned_rank=hints.pinned_rank if hints.HasField("pinned_rank") else None,
        allowed_workers=frozenset(map(WorkerId, hints.allowed_worker_ids)),
        excluded_workers=frozenset(map(WorkerId, hints.excluded_worker_ids)),
        required_labels=dict(hints.required_labels),
        preferred_labels=dict(hints.preferred_labels),
        session_id=hints.session_id or None,
        priority=hints.priority if hints.HasField("priority") else DEFAULT_PRIORITY,
        overrides=CostOverrides(
            overlap_credit=cost.overlap_credit if cost.HasField("overlap_credit") else None,
            prefill_scale=cost.prefill_scale if cost.HasField("prefill_scale") else None,
            request_weight=cost.request_weight if cost.HasField("request_weight") else None,
            temperature=cost.temperature if cost.HasField("temperature") else None,
        ),
    )


def _hints_to_proto(query: RoutingQuery) -> generation_pb2.RoutingHints:
    hints, overrides = query.hints, query.hints.overrides
    return generation_pb2.RoutingHints(
        pinned_worker_id=hints.pinned_worker or "",
        pinned_rank=hints.pinned_rank,
        allowed_worker_ids=sorted(hints.allowed_workers),
        excluded_worker_ids=sorted(hints.excluded_workers),
        required_labels=hints.required_labels,
        preferred_labels=hints.preferred_labels,
        session_id=hints.session_id or "",
        priority=hints.priority,
        cost=generation_pb2.CostOverrides(
            overlap_credit=overrides.overlap_credit,
            prefill_scale=overrides.prefill_scale,
            request_weight=overrides.request_weight,
            temperature=overrides.temperature,
        ),
        lora=query.lora or "",
        cache_namespace=query.cache_namespace or "",
    )


def key_from_proto(request_id: str, attempt: int, *, path: str = "") -> AttemptKey:
    """Return the key of a reservation. Raises: FixRequestError(INVALID_FIELD) naming the field under `path`."""
    if not request_id:
        raise invalid(f"{path}request_id", "required")
    if len(request_id.encode()) > MAX_CLIENT_ID_BYTES:  # it is remembered long after the booking has ended
        raise invalid(f"{path}request_id", f"at most {MAX_CLIENT_ID_BYTES} bytes")
    if attempt < 1:
        raise invalid(f"{path}attempt", "0 is out of range: 1 or more")
    return AttemptKey(RequestId(request_id), attempt)


def progress_from_proto(progress: router_pb2.ReservationProgress, *, path: str) -> Progress:
    """Return the core's form of one line of a report. Raises: FixRequestError(INVALID_FIELD) as `key_from_proto`."""
    if progress.output_blocks > _MAX_OUTPUT_BLOCKS:
        raise invalid(f"{path}output_blocks", f"{progress.output_blocks} is out of range: 0 to {_MAX_OUTPUT_BLOCKS:,}")
    has_sequence = progress.HasField("accepted_load_sequence")
    return Progress(
        key=key_from_proto(progress.request_id, progress.attempt, path=path),
        accepted_load_sequence=progress.accepted_load_sequence if has_sequence else None,
        prefill_complete=progress.prefill_complete,
        output_blocks=progress.output_blocks,
    )


def _prompt(
    query: router_pb2.RoutingQuery, block_sizes: Collection[int], path: str
) -> tuple[int, dict[int, PromptBlocks]]:
    """Return the prompt's tokens, counted, and its hashes by block size."""
    form = query.WhichOneof("input")
    if query.prompt_tokens > _MAX_PROMPT_TOKENS:
        raise invalid(f"{path}.prompt_tokens", f"{query.prompt_tokens} is out of range: at most {_MAX_PROMPT_TOKENS}")
    if query.multimodal and form not in _TOKEN_FORMS:
        raise invalid(f"{path}.multimodal", f"goes with {' or '.join(_TOKEN_FORMS)}: it names tokens by their index")
    match form:
        case "token_ids":
            tokens = np.array(query.token_ids.token_ids, dtype=np.uint32)
        case "packed_token_ids":
            if len(query.packed_token_ids) % _TOKEN_BYTES:
                raise invalid(f"{path}.packed_token_ids", f"{_TOKEN_BYTES} bytes are one token: some are missing")
            tokens = np.frombuffer(query.packed_token_ids, dtype="<u4")
        case "text":
            tokens = text_tokens(query.text)
        case "block_hashes":
            return query.prompt_tokens, _given_hashes(query, block_sizes, path)
        case _ if query.prompt_tokens:  # nothing is known of its blocks: cold everywhere
            return query.prompt_tokens, {}
        case _:
            raise invalid(path, "set one of token_ids, packed_token_ids, block_hashes, text, or prompt_tokens alone")
    if not len(tokens):
        raise FixRequestError(Reason.EMPTY_PROMPT, "", field=f"{path}.{form}")
    if form in _TOKEN_FORMS and query.prompt_tokens not in (0, len(tokens)):
        raise invalid(f"{path}.prompt_tokens", f"{query.prompt_tokens} are not the {len(tokens)} of {form}")
    _check_spans(query, prompt_tokens=len(tokens), path=path)
    return len(tokens), block_hashes_by_size(tokens, block_sizes, query.hints, query.multimodal)


def _check_spans(query: router_pb2.RoutingQuery, *, prompt_tokens: int, path: str) -> None:
    for index, span in enumerate(query.multimodal):
        end = span.first_token + span.token_count
        if not span.token_count or end > prompt_tokens:
            raise invalid(
                f"{path}.multimodal[{index}]", f"tokens {span.first_token} to {end} are not within {prompt_tokens}"
            )
    in_order = sorted(enumerate(query.multimodal), key=lambda numbered: numbered[1].first_token)
    for (_, before), (index, span) in pairwise(in_order):
        if before.first_token + before.token_count > span.first_token:
            raise invalid(f"{path}.multimodal[{index}]", f"token {span.first_token} lies in another span already")


def _given_hashes(query: router_pb2.RoutingQuery, block_sizes: Collection[int], path: str) -> dict[int, PromptBlocks]:
    given = query.block_hashes
    size, field = given.block_size, "local_hashes" if given.local_hashes else "sequence_hashes"
    hashes = getattr(given, field)
    if not query.prompt_tokens:
        raise invalid(f"{path}.prompt_tokens", "required with block_hashes")
    if size < 1:
        raise invalid(f"{path}.block_hashes.block_size", "0 is out of range: 1 or more")
    if block_sizes and size not in block_sizes:  # with no worker alive, that is the trouble to be told of
        known = ", ".join(map(str, sorted(block_sizes)))
        raise invalid(f"{path}.block_hashes.block_size", f"{size} is no live worker's, which are {known}")
    if given.local_hashes and given.sequence_hashes:
        raise invalid(f"{path}.block_hashes.local_hashes", "set these or sequence_hashes, not both")
    if len(hashes) > query.prompt_tokens // size:
        raise invalid(
            f"{path}.block_hashes.{field}",
            f"{len(hashes)} are too many: {query.prompt_tokens} tokens fill {query.prompt_tokens // size} blocks",
        )
    if given.local_hashes:
        return {size: PromptBlocks(np.array(hashes, dtype=np.uint64), None, size)}
    return {size: PromptBlocks.of_sequence(hashes, size)}
