"""Writes of one turn of the loop reach the connection as one."""

import asyncio
from typing import Any

from kvmesh.gateway.corked_transport import CorkedTransport


class RecordingTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__(extra={"peername": ("127.0.0.1", 7)})
        self.seen: list[bytes | str] = []

    def write(self, data: Any) -> None:
        self.seen.append(bytes(data))

    def close(self) -> None:
        self.seen.append("closed")


def corked() -> tuple[CorkedTransport, RecordingTransport]:
    transport = RecordingTransport()
    return CorkedTransport(transport, loop=asyncio.get_running_loop()), transport


async def test_writes_of_one_turn_leave_together_and_in_order() -> None:
    connection, transport = corked()

    connection.write(b"head ")
    connection.write(b"first ")
    before_the_end_of_the_turn = list(transport.seen)
    await asyncio.sleep(0)
    connection.write(b"second")
    await asyncio.sleep(0)

    assert before_the_end_of_the_turn == []
    assert transport.seen == [b"head first ", b"second"]


async def test_much_leaves_at_once() -> None:
    connection, transport = corked()

    connection.write(b"a")
    connection.write(b"b" * 100_000)
    in_the_same_turn = list(transport.seen)
    connection.write(b"c")
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert in_the_same_turn == [b"a" + b"b" * 100_000]
    assert transport.seen[1:] == [b"c"]


async def test_a_flush_sends_what_waits_and_nothing_twice() -> None:
    connection, transport = corked()

    connection.write(b"head ")
    connection.write(b"first")
    connection.flush()
    in_the_same_turn = list(transport.seen)
    await asyncio.sleep(0)

    assert in_the_same_turn == transport.seen == [b"head first"]


async def test_a_close_sends_what_was_written_and_nothing_twice() -> None:
    connection, transport = corked()

    connection.write(b"last")
    connection.close()
    await asyncio.sleep(0)

    assert transport.seen == [b"last", "closed"]


async def test_everything_else_is_the_transports_own() -> None:
    connection, _ = corked()

    assert connection.get_extra_info("peername") == ("127.0.0.1", 7)
