"""The contract through the eyes of a stranger's tool: `buf curl`, which knows nothing but what reflection tells it."""

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2

from kvmesh.testing.mesh_process import WAIT_S, MeshProcess, run_kvmesh

BUF = Path(__file__).parents[2] / "node_modules" / ".bin" / "buf"
GATEWAY_SERVICES = {
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "kvmesh.v1.Components",
    "kvmesh.v1.Frontend",
    "kvmesh.v1.Processor",
    "kvmesh.v1.Router",
    "kvmesh.v1.WorkerControl",
}
DECODE_WORKER_SERVICES = {
    "grpc.health.v1.Health",
    "grpc.reflection.v1alpha.ServerReflection",
    "kvmesh.v1.DecodeWorker",
    "kvmesh.v1.KvTransfer",
    "kvmesh.v1.WorkerControl",
    "kvmesh.v1.WorkerEvents",
}
REFLECT = "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

pytestmark = pytest.mark.skipif(not BUF.exists(), reason="node_modules/.bin/buf is not installed: make proto-lint")


@pytest.fixture(scope="module")
def mesh() -> Iterator[MeshProcess]:
    with MeshProcess("--engine", "echo") as mesh:
        yield mesh


def buf_curl(address: str, path: str = "", *flags: str, data: object = None) -> subprocess.CompletedProcess[str]:
    body = [] if data is None else ["--data", json.dumps(data)]
    url = f"http://{address}/{path}".rstrip("/")
    return subprocess.run(
        [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *flags, *body, url],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def json_stream(text: str) -> list[Any]:
    """Return the JSON values that stand one after the other."""
    decoder, values, rest = json.JSONDecoder(), [], text.strip()
    while rest:
        value, end = decoder.raw_decode(rest)
        values.append(value)
        rest = rest[end:].lstrip()
    return values


def error_info(error: dict[str, Any]) -> error_details_pb2.ErrorInfo:
    """Return the one ErrorInfo among the details of an error."""
    (value,) = [detail["value"] for detail in error["details"] if detail["type"] == "google.rpc.ErrorInfo"]
    return error_details_pb2.ErrorInfo.FromString(base64.b64decode(value + "=" * (-len(value) % 4)))


def test_reflection_lists_every_service_of_the_gateway(mesh: MeshProcess) -> None:
    done = buf_curl(mesh.grpc_address, "", "--list-services")

    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == GATEWAY_SERVICES


def test_reflection_lists_every_service_of_a_decode_worker_on_its_own_port(mesh: MeshProcess) -> None:
    topology = json.loads(run_kvmesh("status", "--json", "--target", mesh.grpc_address).stdout)
    address = next(worker["address"] for worker in topology["workers"] if worker["role"] == "decode")

    done = buf_curl(address, "", "--list-services")

    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == DECODE_WORKER_SERVICES


def test_reflection_lists_the_methods_of_the_frontend(mesh: MeshProcess) -> None:
    done = buf_curl(mesh.grpc_address, "", "--list-methods")

    assert {name for name in done.stdout.split() if name.startswith("kvmesh.v1.Frontend/")} == {
        "kvmesh.v1.Frontend/Generate",
        "kvmesh.v1.Frontend/GenerateText",
        "kvmesh.v1.Frontend/ListModels",
        "kvmesh.v1.Frontend/GetTopology",
        "kvmesh.v1.Frontend/WatchTopology",
    }


def test_reflection_describes_generate_as_a_stream_of_typed_answers(mesh: MeshProcess) -> None:
    done = buf_curl(mesh.grpc_address, REFLECT, data={"fileContainingSymbol": "kvmesh.v1.Frontend"})

    assert (done.returncode, done.stderr) == (0, "")
    (answer,) = json_stream(done.stdout)
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(encoded))
        for encoded in answer["fileDescriptorResponse"]["fileDescriptorProto"]
    ]
    methods = {rpc.name: rpc for file in files for service in file.service for rpc in service.method}
    generate = methods["Generate"]
    assert (generate.client_streaming, generate.server_streaming) == (False, True)
    assert (generate.input_type, generate.output_type) == (
        ".kvmesh.v1.GenerateRequest",
        ".kvmesh.v1.GenerateResponse",
    )


def test_json_goes_in_and_a_stream_of_json_comes_out(mesh: MeshProcess) -> None:
    request = {"prompt": {"text": "Tell me a joke"}, "client_request_id": "id_number"}

    done = buf_curl(mesh.grpc_address, "kvmesh.v1.Frontend/Generate", data=request)

    assert (done.returncode, done.stderr) == (0, "")
    first, *chunks, last = json_stream(done.stdout)
    assert first["started"]["clientRequestId"] == "id_number"
    assert first["started"]["workerId"] in ("NODE1/decode/0", "NODE2/decode/1")
    node = first["started"]["workerId"].partition("/")[0]
    assert "".join(chunk["chunk"]["text"] for chunk in chunks) == f"Tell me a joke_GeneratedBy_{node}"
    assert last["finished"]["reason"] == "FINISH_REASON_STOP"
    assert last["finished"]["usage"]["promptTokens"] == 14


def test_the_health_of_the_process_is_serving(mesh: MeshProcess) -> None:
    done = buf_curl(mesh.grpc_address, "grpc.health.v1.Health/Check", data={})

    assert json_stream(done.stdout) == [{"status": "SERVING"}]


@pytest.mark.parametrize(
    ("request_body", "code", "reason", "field"),
    [
        ({"prompt": {"text": ""}}, "invalid_argument", "EMPTY_PROMPT", "prompt.text"),
        ({}, "invalid_argument", "EMPTY_PROMPT", "prompt"),
        ({"prompt": {"text": "a"}, "model": "none"}, "not_found", "UNKNOWN_MODEL", "model"),
        (
            {"prompt": {"text": "a"}, "sampling": {"max_tokens": 0}},
            "invalid_argument",
            "INVALID_FIELD",
            "sampling.max_tokens",
        ),
    ],
    ids=["empty prompt", "no prompt", "unknown model", "max_tokens 0"],
)
def test_a_refusal_carries_its_reason_in_error_info(
    mesh: MeshProcess, request_body: dict[str, object], code: str, reason: str, field: str
) -> None:
    done = buf_curl(mesh.grpc_address, "kvmesh.v1.Frontend/Generate", data=request_body)

    assert done.returncode != 0
    assert done.stdout == ""
    error = json.loads(done.stderr)
    info = error_info(error)
    assert error["code"] == code
    assert (info.domain, info.reason) == ("kvmesh", reason)
    assert info.metadata["field"] == field


def test_an_unknown_field_fails_on_the_client(mesh: MeshProcess) -> None:
    before = _requests(mesh)

    done = buf_curl(mesh.grpc_address, "kvmesh.v1.Frontend/Generate", data={"prompt": {"text": "a"}, "max_tokenz": 1})

    assert done.returncode != 0
    assert "max_tokenz" in done.stderr
    assert _requests(mesh) == before


def _requests(mesh: MeshProcess) -> int:
    done = run_kvmesh("status", "--json", "--target", mesh.grpc_address)
    return int(json.loads(done.stdout)["counters"]["requests"])
