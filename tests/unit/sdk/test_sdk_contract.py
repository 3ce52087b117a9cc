"""Python types as a contract: what becomes what, as protoc reads the printed file, and there and back again."""

import base64
import subprocess
import zlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from google.protobuf import descriptor_pb2
from pydantic import BaseModel, ConfigDict, Field

from kvmesh.core.errors import FixRequestError, MeshError, Reason
from kvmesh.sdk import endpoint, service
from kvmesh.sdk.codec import Codec, answer_bytes, codec_of
from kvmesh.sdk.contract import contract_of, decode_contract
from kvmesh.sdk.definitions import definition_of
from kvmesh.sdk.proto_source import proto_source
from kvmesh.v1 import generation_pb2
from kvmesh.wire.comments import comments_of

ROOT = Path(__file__).parents[3]
PROTOC = ROOT / ".venv-protos" / "bin" / "python"


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Part(BaseModel):
    name: str
    size: int | None = None


class Everything(BaseModel):
    """One field of each kind."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(description="Required.")
    flag: bool = False
    ratio: float = 0.5
    raw: bytes = b""
    count: int = 7
    small: Annotated[int, Field(ge=0, le=10)] = 1
    byte: int = Field(default=0, ge=0, lt=2**32)
    huge: int = Field(default=0, ge=0, le=2**64 - 1)
    colour: Colour = Colour.RED
    mode: Literal["fast", "slow"] = "fast"
    key: UUID | None = None
    at: datetime | None = None
    span: timedelta | None = None
    part: Part | None = None
    parts: list[Part]
    numbers: list[int] = []
    by_name: dict[str, Part] = {}
    weights: dict[str, float] = {}
    anything: Any = None
    table: dict[str, Any] = {}
    either: int | str | None = None
    pair: tuple[int, str] | None = None


@service(namespace="my-space")
class HTTPWorker:
    """Takes everything."""

    @endpoint()
    async def echo(self, request: Everything) -> Everything:
        """Give it back."""
        return request

    @endpoint()
    async def watch(self, request: Part) -> AsyncIterator[str]:
        yield request.name

    @endpoint()
    async def sample(self, request: generation_pb2.SamplingParams) -> generation_pb2.Chunk:
        return generation_pb2.Chunk(text=str(request.max_tokens))

    @endpoint()
    async def forget(self, request: dict[str, Any]) -> None:
        return None


CONTRACT = contract_of(definition_of(HTTPWorker))
FIELDS = {field.name: field for field in CONTRACT.service.methods_by_name["echo"].input_type.fields}


def codec(annotation: Any = Everything) -> Codec:
    descriptor = CONTRACT.service.methods_by_name["echo"].input_type
    return codec_of(descriptor, annotation)


def refusal(data: object, model: Codec) -> str | None:
    """Return the field that decoding what a stranger sent is refused for."""
    sent = codec_of(CONTRACT.service.methods_by_name["echo"].input_type, Any).encode(data)
    with pytest.raises(FixRequestError) as refused:
        model.decode(sent)
    return refused.value.field


def test_the_names_of_a_contract() -> None:
    service_ = CONTRACT.service

    assert service_.full_name == "sdk.my_space.http_worker.HTTPWorker"
    assert service_.file.name == "sdk/my_space/http_worker.proto"
    assert {(one.name, one.input_type.full_name, one.output_type.full_name) for one in service_.methods} == {
        ("echo", "sdk.my_space.http_worker.Everything", "sdk.my_space.http_worker.Everything"),
        ("watch", "sdk.my_space.http_worker.Part", "google.protobuf.StringValue"),
        ("sample", "kvmesh.v1.SamplingParams", "kvmesh.v1.Chunk"),
        ("forget", "google.protobuf.Struct", "google.protobuf.Empty"),
    }
    assert [one.name for one in service_.methods if one.server_streaming] == ["watch"]


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("text", "optional string text = 1;"),
        ("flag", "optional bool flag = 2;"),
        ("ratio", "optional double ratio = 3;"),
        ("raw", "optional bytes raw = 4;"),
        ("count", "optional int64 count = 5;"),
        ("small", "optional int32 small = 6;"),
        ("byte", "optional uint32 byte = 7;"),
        ("huge", "optional uint64 huge = 8;"),
        ("colour", "optional string colour = 9;"),
        ("mode", "optional string mode = 10;"),
        ("key", "optional string key = 11;"),
        ("at", "optional google.protobuf.Timestamp at = 12;"),
        ("span", "optional google.protobuf.Duration span = 13;"),
        ("part", "optional Part part = 14;"),
        ("parts", "repeated Part parts = 15;"),
        ("numbers", "repeated int64 numbers = 16;"),
        ("by_name", "map<string, Part> by_name = 17;"),
        ("weights", "map<string, double> weights = 18;"),
        ("anything", "optional google.protobuf.Value anything = 19;"),
        ("table", "optional google.protobuf.Struct table = 20;"),
        ("either", "optional google.protobuf.Value either = 21;"),
        ("pair", "optional google.protobuf.Value pair = 22;"),
    ],
)
def test_each_type_has_its_form(field: str, expected: str) -> None:
    lines = [line.strip() for line in proto_source(CONTRACT.file).splitlines()]

    assert expected in lines
    assert field in FIELDS


@pytest.mark.skipif(not PROTOC.exists(), reason=".venv-protos is not installed: make install-dev")
def test_protoc_reads_the_printed_file_as_the_contract_that_is_served(tmp_path: Path) -> None:
    source = tmp_path / CONTRACT.file.name
    source.parent.mkdir(parents=True)
    source.write_text(proto_source(CONTRACT.file))
    out = tmp_path / "out.binpb"
    paths = [f"--proto_path={tmp_path}", f"--proto_path={ROOT / 'protos'}", f"--proto_path={ROOT / 'build/googleapis'}"]
    command = [str(PROTOC), "-m", "grpc_tools.protoc", *paths, f"--descriptor_set_out={out}", str(source)]
    subprocess.run([*command, "--include_source_info"], check=True, timeout=40, capture_output=True)

    (found,) = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file

    served = descriptor_pb2.FileDescriptorProto()
    served.CopyFrom(CONTRACT.file)
    assert comments_of(found) == comments_of(served)
    for file in (found, served):
        file.ClearField("source_code_info")
        for message in file.message_type:
            for field in message.field:
                field.ClearField("json_name")
            for entry in message.nested_type:
                for field in entry.field:
                    field.ClearField("json_name")
        dependencies = sorted(file.dependency)
        del file.dependency[:]
        file.dependency.extend(dependencies)
    assert found == served


def test_a_contract_travels_as_text() -> None:
    service_, comments = decode_contract(CONTRACT.encode())

    assert service_.full_name == CONTRACT.service.full_name
    assert comments["sdk.my_space.http_worker.Everything.text"] == "Required."
    assert comments["sdk.my_space.http_worker.HTTPWorker.echo"] == "Give it back."
    for text in ("", "no base64!", "AAAA", CONTRACT.encode()[:-8]):
        with pytest.raises(ValueError, match="no contract"):
            decode_contract(text)


def test_a_contract_of_a_stranger_is_read_in_bounded_memory() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(1 << 26))).decode()

    with pytest.raises(ValueError, match="longer than 1048576 bytes"):
        decode_contract(bomb)


FULL = Everything(
    text="a",
    flag=True,
    ratio=1.5,
    raw=b"\x00a",
    count=-(2**40),
    small=3,
    byte=2**32 - 1,
    huge=2**64 - 1,
    colour=Colour.BLUE,
    mode="slow",
    key=UUID(int=5),
    at=datetime(2026, 11, 21, 12, 30, tzinfo=UTC),
    span=timedelta(seconds=90),
    part=Part(name="p", size=4),
    parts=[Part(name="q"), Part(name="r", size=0)],
    numbers=[1, -2],
    by_name={"x": Part(name="s")},
    weights={"w": 0.25},
    anything={"deep": [1, "two", None]},
    table={"n": 1},
    either="text",
    pair=(1, "one"),
)


@pytest.mark.parametrize("value", [FULL, Everything(text="", parts=[])])
def test_a_model_comes_back_as_it_went(value: Everything) -> None:
    assert codec().decode(codec().encode(value)) == value


def test_defaults_and_missing_lists_are_filled_in() -> None:
    sent = codec_of(CONTRACT.service.methods_by_name["echo"].input_type, Any).encode({"text": "t"})

    found = codec().decode(sent)

    assert found == Everything(text="t", parts=[])


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({}, "text"),
        ({"text": "t", "small": 11}, "small"),
        ({"text": "t", "colour": "green"}, "colour"),
        ({"text": "t", "part": {"size": 1}}, "part.name"),
        ({"text": "t", "parts": [{"name": "a"}, {"size": 1}]}, "parts[1].name"),
        ({"text": "t", "by_name": {"k": {}}}, "by_name.k.name"),
    ],
)
def test_a_wrong_shape_is_refused_by_the_path_of_its_field(data: object, field: str) -> None:
    assert refusal(data, codec()) == field


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"txt": "t"}, "txt"),
        ({"text": 5.5}, "text"),
        ({"text": "t", "part": {"nme": "x"}}, "part.nme"),
        ({"text": "t", "numbers": ["x"]}, "numbers"),
        ({"text": "t", "part": 5}, "part"),
    ],
)
def test_a_caller_without_the_model_is_told_the_field_before_it_calls(data: object, field: str) -> None:
    plain = codec_of(CONTRACT.service.methods_by_name["echo"].input_type, Any)

    with pytest.raises(FixRequestError) as refused:
        plain.encode(data)

    assert refused.value.field == field


def test_a_caller_may_send_the_text_of_a_json_object() -> None:
    plain = codec_of(CONTRACT.service.methods_by_name["echo"].input_type, Any)

    assert codec().decode(plain.encode('{"text": "t", "parts": []}')) == Everything(text="t", parts=[])
    with pytest.raises(FixRequestError, match="not JSON"):
        plain.encode("{")


def test_an_answer_that_is_not_of_the_contract_is_the_workers_fault() -> None:
    with pytest.raises(MeshError) as failed:
        answer_bytes(codec(), {"text": 5}, endpoint="ns/W/echo")

    assert failed.value.reason is Reason.INTERNAL
    assert "ns/W/echo answered what its contract does not have: text:" in failed.value.message


@pytest.mark.parametrize("answer", [FULL, FULL.model_dump_json(), FULL.model_dump()])
def test_an_answer_may_be_the_model_its_json_or_its_dict(answer: Any) -> None:
    assert codec().decode(answer_bytes(codec(), answer, endpoint="")) == FULL


def test_a_time_without_a_zone_counts_as_utc() -> None:
    value = Everything(text="t", parts=[], at=datetime(2026, 1, 1, 5))

    assert codec().decode(codec().encode(value)).at == datetime(2026, 1, 1, 5, tzinfo=UTC)
