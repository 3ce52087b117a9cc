"""A decode worker that has long prompts prefilled elsewhere. Serve it: kvmesh serve remote_prefill:DecodeWorker."""

import hashlib
from collections.abc import AsyncIterator

from pydantic import BaseModel, Field

from kvmesh.sdk import TryElsewhereError, context, depends, endpoint, service


class Prompt(BaseModel):
    """What to continue."""

    text: str
    max_tokens: int = Field(default=4, ge=1, le=64)


class Cache(BaseModel):
    """What a prefill computes; a real engine hands over where its KV blocks are, and not the blocks."""

    state: bytes
    worker_id: str


class Token(BaseModel):
    """One token, and who prefilled the prompt."""

    text: str
    prefilled_by: str


def prefill(text: str) -> bytes:
    """Stand for the forward pass over a prompt."""
    return hashlib.sha256(text.encode()).digest()


@service(namespace="your_namespace")
class PrefillWorker:
    """Computes the cache of a prompt."""

    @endpoint()
    async def generate(self, request: Prompt) -> Cache:
        """Compute it."""
        return Cache(state=prefill(request.text), worker_id=context.worker_id)


@service(namespace="your_namespace")
class DecodeWorker:
    """Generates; prompts from `remote_from` characters on are prefilled remotely, if anybody does that."""

    prefill_worker = depends(PrefillWorker)

    def __init__(self) -> None:
        self.remote_from = int(context.config.get("remote_from", 16))

    @endpoint()
    async def generate(self, request: Prompt) -> AsyncIterator[Token]:
        """Stream tokens that depend on the whole prompt."""
        cache = await self._cache(request)
        for index in range(request.max_tokens):
            yield Token(text=f"{cache.state[index % len(cache.state)]:02x}", prefilled_by=cache.worker_id)

    async def _cache(self, request: Prompt) -> Cache:
        if len(request.text) >= self.remote_from:
            try:
                found: Cache = await self.prefill_worker.generate(request, timeout_s=5)
                return found
            except TryElsewhereError:  # nobody does it now: the prompt is answered all the same
                pass
        return Cache(state=prefill(request.text), worker_id=context.worker_id)
