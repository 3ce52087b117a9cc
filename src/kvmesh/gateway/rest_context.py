"""What a servicer sees of a call that came over HTTP, in place of gRPC's own context.

Only what servicers of the mesh use. Metadata sent back becomes headers of the reply, as long as none were sent; errors
are raised as MeshErrors, or given to `abort` or `set_code` as anywhere else.
"""

import asyncio
from typing import NoReturn

import grpc
from google.rpc import status_pb2

from kvmesh.gateway.call_metadata import Metadata, initial_headers, trailing_headers
from kvmesh.gateway.failures import Headers, RpcAbortedError

_DETAILS_KEY = "grpc-status-details-bin"


class RestContext:
    """The context of one call."""

    def __init__(self, *, request_id: str, metadata: Metadata, peer: str, timeout_s: float | None) -> None:
        """`metadata` is what the request's headers say, see `call_metadata`; the deadline is counted from now."""
        self.request_id = request_id
        """The mesh's id of the request (UUIDv7)."""
        self._metadata = tuple(metadata)
        self._peer = peer
        self._loop = asyncio.get_running_loop()
        self._deadline = None if timeout_s is None else self._loop.time() + timeout_s
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._initial: list[tuple[str, str | bytes]] = []
        self._trailing: Metadata = ()

    def invocation_metadata(self) -> Metadata:
        """Return the request's metadata."""
        return self._metadata

    def peer(self) -> str:
        """Return the client's address as gRPC writes it."""
        return self._peer

    def time_remaining(self) -> float | None:
        """Return the seconds until the deadline, 0 or more; None without one."""
        return None if self._deadline is None else max(self._deadline - self._loop.time(), 0.0)

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        """Keep metadata for the reply's headers, which go with its first message."""
        self._initial += metadata

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        """Keep metadata for the reply's headers: of a stream, what is known at its first message."""
        self._trailing = tuple(metadata)

    def reply_headers(self) -> Headers:
        """Return the metadata sent back so far as headers."""
        return [*initial_headers(self._initial), *trailing_headers(self._trailing)]

    def set_code(self, code: grpc.StatusCode) -> None:
        """Choose the status that the call will have; servicers of the mesh raise instead."""
        self._code = code

    def set_details(self, details: str) -> None:
        """Choose the text of that status; servicers of the mesh raise instead."""
        self._details = details

    def check_code(self) -> None:
        """Call when the servicer is done. Raises: RpcAbortedError where it set a code other than OK."""
        if self._code is not None and self._code is not grpc.StatusCode.OK:
            raise RpcAbortedError(status_pb2.Status(code=self._code.value[0], message=self._details))

    def code(self) -> grpc.StatusCode | None:
        """Return the code set so far."""
        return self._code

    def details(self) -> str:
        """Return the text set so far."""
        return self._details

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End the call with a status. Raises: RpcAbortedError always, ValueError for OK."""
        if code is grpc.StatusCode.OK:
            raise ValueError("a call cannot be aborted with OK")
        packed = dict(trailing_metadata).get(_DETAILS_KEY)
        if isinstance(packed, bytes):
            raise RpcAbortedError(status_pb2.Status.FromString(packed))
        raise RpcAbortedError(status_pb2.Status(code=code.value[0], message=details))

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """End the call with a status and its details. Raises: RpcAbortedError always, ValueError for OK."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())
