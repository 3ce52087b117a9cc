"""Log lines on their way to a reader who reads, stalls or is gone."""

import io
import threading

from prometheus_client import REGISTRY

from kvmesh.cli.log_stream import QueuedStream

WAIT_S = 10.0


def dropped() -> float:
    return REGISTRY.get_sample_value("kvmesh_log_lines_dropped_total") or 0.0


class StalledReader:
    """Takes one text, and no more until it is let go on."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.is_stalled = threading.Event()
        self.goes_on = threading.Event()

    def write(self, text: str) -> None:
        self.texts.append(text)
        self.is_stalled.set()
        assert self.goes_on.wait(WAIT_S)


def test_what_was_written_has_arrived_in_order_at_the_end() -> None:
    out = io.StringIO()
    stream = QueuedStream(out.write, is_terminal=False)

    for number in range(100):
        stream.write(f"{number}\n")
    stream.finish(WAIT_S)

    assert out.getvalue() == "".join(f"{number}\n" for number in range(100))


def test_a_reader_who_stalls_costs_lines_and_no_time() -> None:
    reader = StalledReader()
    stream = QueuedStream(reader.write, is_terminal=False, max_queued=2)
    before = dropped()
    stream.write("taken")
    assert reader.is_stalled.wait(WAIT_S)

    for text in ("queued", "queued too", "dropped", "dropped too"):
        stream.write(text)
    reader.goes_on.set()
    stream.finish(WAIT_S)

    assert reader.texts == ["taken", "queued", "queued too"]
    assert dropped() == before + 2


def test_the_end_does_not_wait_for_a_reader_who_stalls() -> None:
    reader = StalledReader()
    stream = QueuedStream(reader.write, is_terminal=False, max_queued=1)
    stream.write("taken")
    assert reader.is_stalled.wait(WAIT_S)
    stream.write("queued")

    stream.finish(0.05)

    assert reader.texts == ["taken"]
    reader.goes_on.set()


def test_a_reader_who_is_gone_costs_every_line_and_nothing_else() -> None:
    def broken(_text: str) -> None:
        raise BrokenPipeError

    stream = QueuedStream(broken, is_terminal=False)
    before = dropped()

    lengths = [stream.write("one\n"), stream.write("more\n")]
    stream.finish(WAIT_S)

    assert lengths == [4, 5]
    assert dropped() == before + 2
