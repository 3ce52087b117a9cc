"""What waits for a frame keeps its order, and what is due does not wait for the rest."""

from kvmesh.services.pending_output import PendingOutput
from kvmesh.v1 import decode_worker_pb2


def frame_of(pending: PendingOutput, *, only_due: bool = False) -> decode_worker_pb2.ExchangeResponse:
    frame = decode_worker_pb2.ExchangeResponse()
    pending.move_to(frame, only_due=only_due)
    return frame


def columns(frame: decode_worker_pb2.ExchangeResponse) -> tuple[list[int], list[int], list[int], list[str]]:
    return list(frame.stream_ids), list(frame.counts), list(frame.token_ids), list(frame.words)


def test_steps_of_one_stream_become_one_column_entry_in_their_order() -> None:
    pending = PendingOutput()
    first, second = pending.of(1), pending.of(2)
    first.put((10,), ())
    second.put((20, 21), ())
    first.put((11, 12), ())

    frame = frame_of(pending)

    assert columns(frame) == ([1, 2], [3, 2], [10, 11, 12, 20, 21], [])


def test_streams_with_words_come_after_those_with_tokens() -> None:
    pending = PendingOutput()
    pending.of(1).put((), ("a ", "b "))
    pending.of(2).put((20,), ())

    frame = frame_of(pending)

    assert columns(frame) == ([2, 1], [1, 2], [20], ["a ", "b "])


def test_what_is_due_goes_and_the_rest_waits() -> None:
    pending = PendingOutput()
    first, second = pending.of(1), pending.of(2)
    first.put((10,), ())
    second.put((20,), ())
    pending.mark_due(second)

    due, rest = frame_of(pending, only_due=True), frame_of(pending)

    assert columns(due) == ([2], [1], [20], [])
    assert columns(rest) == ([1], [1], [10], [])


def test_what_has_travelled_does_not_travel_again() -> None:
    pending = PendingOutput()
    output = pending.of(1)
    output.put((10,), ())
    frame_of(pending)
    output.put((11,), ())
    pending.mark_due(output)
    pending.mark_due(output)

    again, nothing = frame_of(pending, only_due=True), frame_of(pending)

    assert columns(again) == ([1], [1], [11], [])
    assert columns(nothing) == ([], [], [], [])
