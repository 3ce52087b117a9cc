"""The wire of the tcp transport, byte by byte."""

import struct

import pytest

from kvmesh.transports.tcp_protocol import (
    ANSWER_BYTES,
    MAX_AGENT_BYTES,
    MAX_BLOCKS,
    REQUEST_BYTES,
    ProtocolError,
    Status,
    read_answer,
    read_request_head,
    read_request_rest,
    write_answer,
    write_request,
)

REQUEST = b"kvmQ" + struct.pack("<HHIQ", 1, 3, 2, 256) + b"a@1" + struct.pack("<II", 7, 4_294_967_295)


def test_request_is_laid_out_as_documented() -> None:
    assert write_request("a@1", [7, 4_294_967_295], block_bytes=256) == REQUEST


def test_request_is_read_as_written() -> None:
    head = read_request_head(REQUEST[:REQUEST_BYTES])

    assert (head.block_bytes, head.rest_bytes) == (256, len(REQUEST) - REQUEST_BYTES)
    assert read_request_rest(head, REQUEST[REQUEST_BYTES:]) == ("a@1", [7, 4_294_967_295])


@pytest.mark.parametrize(
    ("agent_name", "block_ids"),
    [
        ("", [0]),
        ("a" * (MAX_AGENT_BYTES + 1), [0]),
        ("a", []),
        ("a", [0] * (MAX_BLOCKS + 1)),
        ("a", [-1]),
        ("a", [2**32]),
    ],
)
def test_request_out_of_bounds_is_not_written(agent_name: str, block_ids: list[int]) -> None:
    with pytest.raises(ProtocolError):
        write_request(agent_name, block_ids, block_bytes=256)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost"[:REQUEST_BYTES],
        b"kvmQ" + struct.pack("<HHIQ", 2, 3, 2, 256),
        b"kvmQ" + struct.pack("<HHIQ", 1, 0, 2, 256),
        b"kvmQ" + struct.pack("<HHIQ", 1, MAX_AGENT_BYTES + 1, 2, 256),
        b"kvmQ" + struct.pack("<HHIQ", 1, 3, 0, 256),
        b"kvmQ" + struct.pack("<HHIQ", 1, 3, MAX_BLOCKS + 1, 256),
    ],
)
def test_request_that_is_none_is_refused(head: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_request_head(head)


def test_agent_that_is_no_text_is_refused() -> None:
    with pytest.raises(ProtocolError):
        read_request_rest(read_request_head(REQUEST[:REQUEST_BYTES]), b"\xff\xff\xff" + bytes(8))


def test_answer_is_laid_out_as_documented() -> None:
    answer = write_answer(Status.OK, size=512)

    assert answer == b"kvmA" + struct.pack("<HHQ", 1, 0, 512)
    assert len(answer) == ANSWER_BYTES
    assert read_answer(answer) == (Status.OK, 512)


@pytest.mark.parametrize(
    "answer",
    [
        b"kvmQ" + struct.pack("<HHQ", 1, 0, 0),
        b"kvmA" + struct.pack("<HHQ", 2, 0, 0),
        b"kvmA" + struct.pack("<HHQ", 1, 99, 0),
    ],
)
def test_answer_that_is_none_is_refused(answer: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_answer(answer)
