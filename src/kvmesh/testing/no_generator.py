"""A mesh without models, for tests of an HTTP door whose generations do not matter."""

from collections.abc import AsyncGenerator

from kvmesh.core.errors import Reason, TryElsewhereError
from kvmesh.v1 import frontend_pb2
from kvmesh.wire.generation import DeltaWriter, Event


class NoGenerator:
    """A Generator that has no workers."""

    async def generate(
        self,
        request: frontend_pb2.GenerateRequest,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        writer: DeltaWriter | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Raises: TryElsewhereError(NO_WORKERS)."""
        nothing: tuple[Event, ...] = ()
        for event in nothing:
            yield event
        raise TryElsewhereError(Reason.NO_WORKERS, "")

    def models(self) -> frontend_pb2.ListModelsResponse:
        """Return none."""
        return frontend_pb2.ListModelsResponse()
