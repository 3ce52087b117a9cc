"""Fetches a task's prefix into the prefill engine: the blocks that the submitter holds and this worker does not.

A prefix saves work and decides nothing: whatever is wrong with it (other blocks, a failed pull, a pin that has ended),
its prompt is computed from what this worker holds itself.
"""

from dataclasses import dataclass

from kvmesh import telemetry
from kvmesh.core.errors import MeshError
from kvmesh.core.hashing import max_overlap_blocks
from kvmesh.engines.engine import EngineRequest
from kvmesh.services.engine_driver import EngineDriver
from kvmesh.services.handoff_fetch import HandoffFetch
from kvmesh.v1 import generation_pb2

log = telemetry.logger(__name__)


@dataclass(frozen=True, slots=True)
class FetchedPrefix:
    """Blocks that are cached and pinned for one task."""

    pin_id: int
    """The caller's to give back, once the engine holds the blocks for the request."""
    tokens: int
    """What was pulled of it: the rest of the prefix was here."""


class PrefixFetch:
    """Fetches prefixes for one prefill engine."""

    def __init__(self, *, driver: EngineDriver, fetcher: HandoffFetch) -> None:
        """Fetch by `fetcher` what `driver`'s engine lacks."""
        self._driver = driver
        self._fetcher = fetcher

    async def fetch(
        self, prefix: generation_pb2.KvHandoff, request: EngineRequest, *, prompt_tokens: int
    ) -> FetchedPrefix | None:
        """Fetch what this worker lacks of `prefix`; None: nothing was pulled. Cancelling frees everything.

        A prefix that is not released here ends with the submitter's wait, at the latest.
        """
        size = self._driver.info.block_size
        most = max_overlap_blocks(prompt_tokens, size)
        hashes = request.block_hashes[: min(len(prefix.block_hashes), most)]
        held = await self._driver.acquire(
            lambda engine: engine.pin_prefix(hashes), undo=lambda engine, pin: engine.unpin(pin.pin_id)
        )
        try:
            first_block = len(held.block_ids)
            if first_block == len(hashes):
                self._fetcher.give_up(prefix)
                return None
            fetched = await self._fetcher.fetch(
                prefix,
                first_block=first_block,
                hashes=hashes,
                local_hashes=request.local_hashes[: len(hashes)],
                spare_blocks=-(-prompt_tokens // size) - len(hashes),
            )
        except MeshError as error:
            log.warning(
                "prefix.not_fetched", request_id=request.key.request_id, attempt=request.key.attempt,
                holder=prefix.worker_id, reason=error.reason.value, error=error.message,
            )  # fmt: skip
            return None
        finally:
            self._driver.post(lambda engine: engine.unpin(held.pin_id))
        return FetchedPrefix(pin_id=fetched.pin_id, tokens=(len(hashes) - first_block) * size)
