"""Models and plain values as messages and back: empty, None, nested, of another type, as JSON writes them."""

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import BaseModel, ConfigDict, RootModel

from kvmesh.core.errors import FixRequestError, MeshError, Reason
from kvmesh.sdk import endpoint, service
from kvmesh.sdk.codec import PlainCodec, answer_bytes, codec_of
from kvmesh.sdk.contract import contract_of
from kvmesh.sdk.definitions import definition_of
from kvmesh.v1 import generation_pb2


class Tags(RootModel[list[str]]):
    """A model that is its one value."""


class Size(RootModel[int | None]):
    """One that may be None."""


class Inner(BaseModel):
    names: list[str]
    by_name: dict[str, int]


class Asking(BaseModel):
    """Every field is required, and most may be empty or None."""

    count: int | None
    free: Any
    either: int | str | None
    part: Inner | None
    inner: Inner
    inners: list[Inner]
    inner_of: dict[str, Inner]
    tags: Tags
    size: Size


class Spoken(BaseModel):
    """What JSON writes as text."""

    at: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    span: timedelta = timedelta(0)
    raw: bytes = b""
    count: int = 0
    free: Any = None
    numbered: dict[int, str] = {}


class Holding(BaseModel):
    """Has messages of another contract."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    one: generation_pb2.Usage
    many: list[generation_pb2.Usage]
    named: dict[str, generation_pb2.Usage] = {}
    said: Struct | None = None
    table: dict[str, Any] = {}


@service(namespace="ns")
class Asker:
    @endpoint()
    async def ask(self, request: Asking) -> Asking:
        return request

    @endpoint()
    async def speak(self, request: Spoken) -> Spoken:
        return request

    @endpoint()
    async def hold(self, request: Holding) -> Holding:
        return request

    @endpoint()
    async def sample(self, request: generation_pb2.SamplingParams) -> generation_pb2.Usage:
        return generation_pb2.Usage()


def message_of(name: str) -> Descriptor:
    return contract_of(definition_of(Asker)).service.methods_by_name[name].input_type


ASKING, SPOKEN, SAMPLING = message_of("ask"), message_of("speak"), message_of("sample")
EMPTY = Inner(names=[], by_name={})


@pytest.mark.parametrize(
    "value",
    [
        Asking(
            count=None, free=None, either=None, part=None, inner=EMPTY, inners=[], inner_of={}, tags=Tags([]),
            size=Size(None),
        ),
        Asking(
            count=0, free=[None], either="", part=EMPTY, inner=Inner(names=["a"], by_name={"b": 0}), inners=[EMPTY],
            inner_of={"k": EMPTY}, tags=Tags(["a", "b"]), size=Size(5),
        ),
    ],
)  # fmt: skip
def test_what_is_required_may_be_empty_or_none(value: Asking) -> None:
    codec = codec_of(ASKING, Asking)

    assert codec.decode(codec.encode(value)) == value


def test_what_is_required_and_may_not_be_none_is_still_missing() -> None:
    with pytest.raises(FixRequestError) as refused:
        codec_of(ASKING, Asking).decode(b"")

    assert refused.value.field == "inner"


def test_a_callers_own_model_has_its_lists_without_the_contracts_model() -> None:
    class MyInner(BaseModel):
        names: list[str]

    class Mine(BaseModel):
        inner: MyInner
        odd: list[list[int]] = []

    sent = codec_of(ASKING, Asking).encode(
        {
            "count": 1, "free": 1, "either": 1, "part": None, "inner": EMPTY, "inners": [], "inner_of": {}, "tags": [],
            "size": 1,
        }
    )  # fmt: skip

    assert codec_of(ASKING, Mine).decode(sent) == Mine(inner=MyInner(names=[]))


def test_none_of_a_free_value_reaches_a_caller_without_the_model() -> None:
    sent = codec_of(SPOKEN, Spoken).encode(Spoken(free=None))

    assert PlainCodec(SPOKEN).decode(sent)["free"] is None


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ('{"at": "2026-11-21T12:30:00Z"}', Spoken(at=datetime(2026, 11, 21, 12, 30, tzinfo=UTC))),
        ('{"at": "2026-11-21T12:30:00+02:00"}', Spoken(at=datetime(2026, 11, 21, 10, 30, tzinfo=UTC))),
        ({"at": "2026-11-21T12:30:00"}, Spoken(at=datetime(2026, 11, 21, 12, 30, tzinfo=UTC))),
        ('{"span": "1.5s"}', Spoken(span=timedelta(seconds=1.5))),
        ('{"span": "PT1M30S"}', Spoken(span=timedelta(seconds=90))),
        ('{"raw": "AP8="}', Spoken(raw=b"\x00\xff")),
        ({"raw": "_w"}, Spoken(raw=b"\xff")),
        ('{"count": "9007199254740993"}', Spoken(count=2**53 + 1)),
        ('{"numbered": {"7": "x"}}', Spoken(numbered={7: "x"})),
    ],
)
def test_a_caller_may_write_values_as_json_does(data: Any, expected: Spoken) -> None:
    assert codec_of(SPOKEN, Spoken).decode(PlainCodec(SPOKEN).encode(data)) == expected


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"at": "yesterday"}, "at"),
        ({"span": "long"}, "span"),
        ({"raw": "!"}, "raw"),
        ({"count": "many"}, "count"),
        ({"free": [1.0, math.nan]}, "free"),
        ({"free": math.inf}, "free"),
    ],
)
def test_text_that_is_no_such_value_is_refused_by_its_field(data: Any, field: str) -> None:
    with pytest.raises(FixRequestError) as refused:
        PlainCodec(SPOKEN).encode(data)

    assert refused.value.field == field


def test_a_value_that_is_no_json_is_refused_by_its_field_where_it_arrives() -> None:
    message: Any = GetMessageClass(SPOKEN)()
    message.free.list_value.values.add().number_value = math.nan

    with pytest.raises(FixRequestError) as refused:
        codec_of(SPOKEN, Spoken).decode(message.SerializeToString())

    assert (refused.value.reason, refused.value.field) == (Reason.INVALID_FIELD, "free")


def test_messages_within_a_model_come_back_as_they_went() -> None:
    usage, said = generation_pb2.Usage(completion_tokens=3), Struct()
    said.update({"a": 1})
    codec = codec_of(message_of("hold"), Holding)
    value = Holding(one=usage, many=[usage, generation_pb2.Usage()], named={"x": usage}, said=said, table={"b": 2})

    assert codec.decode(codec.encode(value)) == value


def test_a_message_of_another_type_is_not_sent() -> None:
    params = generation_pb2.SamplingParams(max_tokens=5)

    assert PlainCodec(SAMPLING).encode(params) == params.SerializeToString()
    for codec in (PlainCodec(SAMPLING), codec_of(SAMPLING, generation_pb2.SamplingParams)):
        with pytest.raises(FixRequestError, match=r"a google\.protobuf\.Timestamp is no kvmesh\.v1\.SamplingParams"):
            codec.encode(Timestamp(seconds=5))


def test_an_answer_of_another_message_type_is_the_workers_fault() -> None:
    with pytest.raises(MeshError) as failed:
        answer_bytes(codec_of(SAMPLING, generation_pb2.SamplingParams), Timestamp(seconds=5), endpoint="ns/Asker/x")

    assert failed.value.reason is Reason.INTERNAL
