"""An Envoy whose grpc_json_transcoder serves a gRPC server's methods as REST: the judge of our own routes."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

_START_S = 30.0
_STOP_S = 10.0
_EXTENSIONS = "type.googleapis.com/envoy.extensions"
_READY = b"starting main dispatch loop"
_ANY_PORT = {"socket_address": {"address": "127.0.0.1", "port_value": 0}}


@asynccontextmanager
async def running_envoy(
    binary: Path, *, descriptor_set: bytes, services: Sequence[str], upstream: str, folder: Path
) -> AsyncIterator[str]:
    """Yield the host:port at which `services` (full names) of the gRPC server `upstream` are served as REST.

    `descriptor_set` holds their files and all that those import; what Envoy writes goes to `folder`.
    """
    config, admin = folder / "envoy.json", folder / "admin.txt"
    config.write_text(json.dumps(_config(descriptor_set, services, upstream)))
    process = await asyncio.create_subprocess_exec(
        binary, "--config-path", config, "--admin-address-path", admin, "--concurrency", "1", "--log-level", "info",
        "--disable-hot-restart", stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(_START_S):
            await _started(process)
            async with httpx.AsyncClient(base_url=f"http://{admin.read_text()}", trust_env=False) as client:
                listeners = (await client.get("/listeners", params={"format": "json"})).json()
        address = listeners["listener_statuses"][0]["local_address"]["socket_address"]
        yield f"{address['address']}:{address['port_value']}"
    finally:
        process.terminate()
        async with asyncio.timeout(_STOP_S):
            await process.communicate()


async def _started(process: asyncio.subprocess.Process) -> None:
    """Wait until Envoy says that it serves. Raises: RuntimeError with its words when it ends instead."""
    assert process.stderr is not None
    said: list[bytes] = []
    async for line in process.stderr:
        if _READY in line:
            return
        said.append(line)
    raise RuntimeError(f"Envoy did not start: {b''.join(said[-5:]).decode()}")


def _config(descriptor_set: bytes, services: Sequence[str], upstream: str) -> dict[str, Any]:
    transcoder = {
        "proto_descriptor_bin": base64.b64encode(descriptor_set).decode("ascii"),
        "services": list(services),
        "convert_grpc_status": True,
        "print_options": {
            "always_print_primitive_fields": True,
            "preserve_proto_field_names": True,
            "stream_newline_delimited": True,
        },
        "request_validation_options": {"reject_unknown_method": True, "reject_unknown_query_parameters": True},
    }
    route = {"match": {"prefix": "/"}, "route": {"cluster": "upstream"}}
    manager = {
        "stat_prefix": "rest",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            _extension("filters.http.grpc_json_transcoder.v3.GrpcJsonTranscoder", transcoder),
            _extension("filters.http.router.v3.Router", {}),
        ],
    }
    connections = _extension("filters.network.http_connection_manager.v3.HttpConnectionManager", manager)
    listener = {"name": "rest", "address": _ANY_PORT, "filter_chains": [{"filters": [connections]}]}
    return {
        "admin": {"address": _ANY_PORT},
        "static_resources": {"listeners": [listener], "clusters": [_cluster(upstream)]},
    }


def _cluster(upstream: str) -> dict[str, Any]:
    host, _, port = upstream.rpartition(":")
    endpoint = {"address": {"socket_address": {"address": host, "port_value": int(port)}}}
    protocol = "upstreams.http.v3.HttpProtocolOptions"
    options: dict[str, Any] = {"explicit_http_config": {"http2_protocol_options": {}}}
    return {
        "name": "upstream",
        "type": "STATIC",
        "typed_extension_protocol_options": {
            f"envoy.extensions.{protocol}": {"@type": f"{_EXTENSIONS}.{protocol}", **options}
        },
        "load_assignment": {"cluster_name": "upstream", "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}]},
    }


def _extension(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"name": kind, "typed_config": {"@type": f"{_EXTENSIONS}.{kind}", **config}}
