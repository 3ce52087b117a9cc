"""A call's metadata from the headers of its request, and the headers of its reply from metadata."""

import pytest

from kvmesh.core.errors import FixRequestError
from kvmesh.gateway.call_metadata import Metadata, initial_headers, metadata_of, trailing_headers
from kvmesh.gateway.failures import HttpRefusalError


def metadata(*headers: tuple[bytes, bytes]) -> Metadata:
    return metadata_of({"headers": headers}, request_id_key="x-request-id", request_id="mesh-id")[1:]


def test_the_mesh_s_id_comes_first_and_the_client_s_own_is_not_among_it() -> None:
    found = metadata_of({"headers": [(b"x-request-id", b"mine")]}, request_id_key="x-request-id", request_id="mesh-id")

    assert found == [("x-request-id", "mesh-id")]


@pytest.mark.parametrize(
    ("header", "item"),
    [
        ((b"grpc-metadata-tenant", b"a"), ("tenant", "a")),
        ((b"grpc-metadata-host", b"a"), ("host", "a")),
        ((b"grpc-metadata-key-bin", b"AP8="), ("key-bin", b"\x00\xff")),
        ((b"grpc-metadata-key-bin", b"AP8"), ("key-bin", b"\x00\xff")),
        ((b"traceparent", b"00-0af7-b7ad-01"), ("traceparent", "00-0af7-b7ad-01")),
        ((b"authorization", b"Bearer x"), ("authorization", "Bearer x")),
        ((b"x-tenant", b"a"), ("x-tenant", "a")),
    ],
)
def test_what_is_meant_for_the_servicer_reaches_it(header: tuple[bytes, bytes], item: tuple[str, str | bytes]) -> None:
    assert metadata(header) == [item]


@pytest.mark.parametrize("name", [b"host", b"content-type", b"content-length", b"cookie", b"connection", b"origin"])
def test_what_is_between_client_and_server_stays_there(name: bytes) -> None:
    assert metadata((name, b"a")) == []


def test_a_value_that_is_no_metadata_is_left_out_where_nobody_called_it_metadata() -> None:
    assert metadata((b"user-agent", b"caf\xe9"), (b"x-odd!", b"a")) == []


@pytest.mark.parametrize(
    "header",
    [
        (b"grpc-metadata-", b"a"),
        (b"grpc-metadata-odd!", b"a"),
        (b"grpc-metadata-grpc-timeout", b"1S"),
        (b"grpc-metadata-a", b"caf\xe9"),
        (b"grpc-metadata-a-bin", b"%"),
        (b"grpc-metadata-a-bin", b"A"),
    ],
)
def test_a_header_that_can_be_no_metadata_is_named(header: tuple[bytes, bytes]) -> None:
    with pytest.raises(FixRequestError) as refused:
        metadata(header)

    assert refused.value.field == header[0].decode()


def test_more_than_grpc_takes_is_refused() -> None:
    assert metadata((b"x-a", b"a" * 8000)) == [("x-a", "a" * 8000)]

    with pytest.raises(HttpRefusalError) as refused:
        metadata((b"x-a", b"a" * 4096), (b"x-b", b"b" * 4096))

    assert refused.value.http_status == 431


def test_metadata_sent_back_becomes_headers() -> None:
    assert initial_headers([("a", "1"), ("b-bin", b"\x00\xff")]) == [
        (b"grpc-metadata-a", b"1"),
        (b"grpc-metadata-b-bin", b"AP8="),
    ]
    assert trailing_headers([("a", "1")]) == [(b"grpc-trailer-a", b"1")]
