"""The HTTP door put together: REST, the OpenAI API, and what operators probe."""

from collections.abc import Callable, Sequence

from google.protobuf.descriptor import ServiceDescriptor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from kvmesh import telemetry
from kvmesh.core.waits import Waits
from kvmesh.gateway.openai_api import openai_routes
from kvmesh.gateway.request_frame import RequestFrame
from kvmesh.gateway.transcoder import Servicer, rpc_routes
from kvmesh.wire.generation import Generator

DEFAULT_MAX_BODY_BYTES = 8 * 1024 * 1024
_DEFAULT_WAITS = Waits()


def create_app(
    *,
    services: Sequence[tuple[ServiceDescriptor, Servicer]],
    generator: Generator,
    unready_reason: Callable[[], str | None],
    exposition: Callable[[], bytes] = telemetry.exposition,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    request_timeout_s: float = _DEFAULT_WAITS.request_s,
    client_write_s: float = _DEFAULT_WAITS.client_write_s,
) -> RequestFrame:
    """Return the app that serves the annotated methods of `services` and the OpenAI API on `generator`.

    `unready_reason` says why the process should get no requests now, None when it should; `request_timeout_s` bounds
    unary calls whose client sets no deadline, `client_write_s` each write of a stream whose client does not read.
    Raises: ValueError for an annotation that cannot be served.
    """

    async def healthz(request: Request) -> Response:
        return Response("ok\n", media_type="text/plain")

    async def readyz(request: Request) -> Response:
        why = unready_reason()
        return Response(f"{why or 'ready'}\n", status_code=503 if why else 200, media_type="text/plain")

    async def metrics(request: Request) -> Response:
        return Response(exposition(), headers={"content-type": telemetry.CONTENT_TYPE_LATEST})

    # A bare router: each layer of a Starlette app would be passed by every token of every stream.
    router = Router(
        [
            *openai_routes(generator, max_body_bytes=max_body_bytes, client_write_s=client_write_s),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
            *rpc_routes(
                services,
                max_body_bytes=max_body_bytes,
                request_timeout_s=request_timeout_s,
                client_write_s=client_write_s,
            ),
        ],
        redirect_slashes=False,
    )
    return RequestFrame(router)
