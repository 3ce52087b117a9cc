"""The catalog is whole, survives the wire, and keeps what is ours from strangers."""

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from kvmesh.core import errors
from kvmesh.core.errors import BackOffError, FixRequestError, MeshError, NotKnownError, Reason, TryElsewhereError
from kvmesh.wire import error_catalog
from kvmesh.wire.error_catalog import CATALOG, HTTP_STATUS

OPENAI_TYPES = {"invalid_request_error", "server_error", "rate_limit_error"}
PINNED = {
    Reason.EMPTY_PROMPT: ("INVALID_ARGUMENT", 400),
    Reason.INVALID_FIELD: ("INVALID_ARGUMENT", 400),
    Reason.UNKNOWN_MODEL: ("NOT_FOUND", 404),
    Reason.NO_WORKERS: ("UNAVAILABLE", 503),
    Reason.NO_MATCHING_WORKER: ("FAILED_PRECONDITION", 400),
    Reason.NO_CAPABLE_WORKER: ("FAILED_PRECONDITION", 400),
    Reason.OVERLOADED: ("RESOURCE_EXHAUSTED", 429),
    Reason.QUEUE_FULL: ("RESOURCE_EXHAUSTED", 429),
    Reason.LEASE_LOST: ("FAILED_PRECONDITION", 400),
    Reason.ALREADY_EXISTS: ("ALREADY_EXISTS", 409),
    Reason.PREFILL_FAILED: ("UNAVAILABLE", 503),
    Reason.KV_TRANSFER_FAILED: ("UNAVAILABLE", 503),
    Reason.PIN_EXPIRED: ("FAILED_PRECONDITION", 400),
    Reason.LAYOUT_MISMATCH: ("FAILED_PRECONDITION", 400),
    Reason.WORKER_LOST: ("UNAVAILABLE", 503),
    Reason.SLOW_CONSUMER: ("RESOURCE_EXHAUSTED", 429),
    Reason.DEADLINE: ("DEADLINE_EXCEEDED", 504),
    Reason.DRAINING: ("UNAVAILABLE", 503),
    Reason.NOT_FOUND: ("NOT_FOUND", 404),
    Reason.NOT_ATTACHED: ("FAILED_PRECONDITION", 400),
    Reason.STALE_EPOCH: ("FAILED_PRECONDITION", 400),
    Reason.CANCELLED: ("CANCELLED", 499),
    Reason.UNIMPLEMENTED: ("UNIMPLEMENTED", 501),
    Reason.INTERNAL: ("INTERNAL", 500),
}
"""Clients rely on these; a reason that is not here is a new promise."""
HIDDEN = (Reason.INTERNAL, Reason.WORKER_LOST, Reason.PREFILL_FAILED, Reason.KV_TRANSFER_FAILED)
SECRET = "ipv4:10.0.0.7:5000 refused"


def error_of(reason: Reason, message: str = "", **more: object) -> MeshError:
    return CATALOG[reason].error_class(reason, message, **more)  # type: ignore[arg-type]  # keywords of MeshError


def packed(detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    wrapped = any_pb2.Any()
    wrapped.Pack(detail)
    return wrapped


def test_every_reason_is_in_the_catalog() -> None:
    assert set(CATALOG) == set(Reason)


@pytest.mark.parametrize("reason", Reason)
def test_reason_has_its_pinned_code_in_grpc_and_http(reason: Reason) -> None:
    code, http_status = PINNED[reason]

    assert CATALOG[reason].code.name == code
    assert error_catalog.http_status(error_of(reason)) == http_status


@pytest.mark.parametrize("reason", Reason)
def test_entry_speaks_in_whole_sentences_and_raises_a_class_of_ours(reason: Reason) -> None:
    entry = CATALOG[reason]

    assert entry.text.endswith(".")
    assert "{" not in entry.text
    assert entry.openai_type in OPENAI_TYPES
    assert issubclass(entry.error_class, MeshError)


def test_error_classes_agree_with_what_the_catalog_says_of_retries() -> None:
    wrong_requests = {reason for reason in Reason if CATALOG[reason].error_class is errors.FixRequestError}
    elsewhere = {reason for reason in Reason if CATALOG[reason].error_class is errors.TryElsewhereError}

    assert not any(CATALOG[reason].retryable for reason in wrong_requests)
    assert all(CATALOG[reason].retryable for reason in elsewhere)


def test_every_code_of_grpc_has_an_http_status() -> None:
    assert {code.name: HTTP_STATUS[code] for code in grpc.StatusCode} == {
        "OK": 200,
        "CANCELLED": 499,
        "UNKNOWN": 500,
        "INVALID_ARGUMENT": 400,
        "DEADLINE_EXCEEDED": 504,
        "NOT_FOUND": 404,
        "ALREADY_EXISTS": 409,
        "PERMISSION_DENIED": 403,
        "UNAUTHENTICATED": 401,
        "RESOURCE_EXHAUSTED": 429,
        "FAILED_PRECONDITION": 400,
        "ABORTED": 409,
        "OUT_OF_RANGE": 400,
        "UNIMPLEMENTED": 501,
        "INTERNAL": 500,
        "UNAVAILABLE": 503,
        "DATA_LOSS": 500,
    }


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason not in HIDDEN])
def test_error_survives_the_wire(reason: Reason) -> None:
    error = error_of(reason, "with words", field="a.b[2]", retry_after_s=1.5, metadata={"wanted": "fp16"})

    received = error_catalog.from_status(error_catalog.to_status(error))

    assert type(received) is CATALOG[reason].error_class
    assert (received.reason, received.message, received.field) == (reason, "with words", "a.b[2]")
    assert (received.retry_after_s, received.metadata) == (1.5, {"wanted": "fp16"})


@pytest.mark.parametrize("reason", Reason)
def test_error_without_words_survives_the_wire(reason: Reason) -> None:
    received = error_catalog.from_status(error_catalog.to_status(error_of(reason)))

    assert (received.reason, received.message, received.field, received.metadata) == (reason, "", None, {})


@pytest.mark.parametrize("reason", HIDDEN)
def test_message_that_may_hold_addresses_or_exceptions_is_shown_to_nobody(reason: Reason) -> None:
    error = error_of(reason, SECRET, field="prompt")

    assert error_catalog.public_text(error) == CATALOG[reason].text
    assert SECRET.encode() not in error_catalog.to_status(error).SerializeToString()
    assert SECRET not in str(error_catalog.openai_error(error))


def test_message_follows_the_text_of_the_catalog() -> None:
    hints = FixRequestError(Reason.NO_MATCHING_WORKER, "no worker has zone=b")
    unknown = NotKnownError(Reason.NOT_FOUND, "no live worker is called 'x'")

    assert error_catalog.public_text(hints) == "No worker matches the routing hints: loosen them; no worker has zone=b"
    assert error_catalog.public_text(unknown) == "Not known here: no live worker is called 'x'"


def test_violation_of_an_error_without_words_has_the_text_of_the_catalog() -> None:
    status = error_catalog.to_status(FixRequestError(Reason.EMPTY_PROMPT, "", field="prompt.text"))

    bad_request = error_details_pb2.BadRequest()
    (violation,) = [detail for detail in status.details if detail.Unpack(bad_request)] and bad_request.field_violations
    assert violation.field == "prompt.text"
    assert violation.description == "The prompt is empty: send at least one token of text."


@pytest.mark.parametrize("message", ["w" * 1_000_000, "\N{LLAMA}" * 1_000_000, "\ud800" * 10])
def test_status_fits_into_trailers_whatever_the_message(message: str) -> None:
    status = error_catalog.to_status(FixRequestError(Reason.INVALID_FIELD, message, field="prompt"))

    assert status.ByteSize() < 4096
    assert status.message.startswith("Invalid field: ")


@pytest.mark.parametrize("reason", [Reason.OVERLOADED, Reason.QUEUE_FULL])
def test_being_full_says_when_to_come_back_even_if_its_raiser_does_not(reason: Reason) -> None:
    assert error_catalog.retry_after_s(BackOffError(reason, "")) == 1.0
    assert error_catalog.retry_after_s(BackOffError(reason, "", retry_after_s=0.25)) == 0.25


def test_errors_that_waiting_does_not_help_say_nothing_of_it() -> None:
    assert error_catalog.retry_after_s(NotKnownError(Reason.NOT_FOUND, "")) is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (code_pb2.CANCELLED, Reason.CANCELLED),
        (code_pb2.INVALID_ARGUMENT, Reason.INVALID_FIELD),
        (code_pb2.OUT_OF_RANGE, Reason.INVALID_FIELD),
        (code_pb2.DEADLINE_EXCEEDED, Reason.DEADLINE),
        (code_pb2.NOT_FOUND, Reason.NOT_FOUND),
        (code_pb2.ALREADY_EXISTS, Reason.ALREADY_EXISTS),
        (code_pb2.RESOURCE_EXHAUSTED, Reason.OVERLOADED),
        (code_pb2.UNIMPLEMENTED, Reason.UNIMPLEMENTED),
        (code_pb2.UNAVAILABLE, Reason.WORKER_LOST),
        (code_pb2.PERMISSION_DENIED, Reason.INTERNAL),
        (code_pb2.DATA_LOSS, Reason.INTERNAL),
        (99, Reason.INTERNAL),
    ],
)
def test_foreign_status_becomes_the_nearest_reason(code: int, reason: Reason) -> None:
    received = error_catalog.from_status(status_pb2.Status(code=code, message="their words"))

    assert (received.reason, received.message) == (reason, "their words")


def test_error_info_of_another_domain_is_not_taken_for_ours() -> None:
    info = error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="elsewhere.example")

    received = error_catalog.from_status(status_pb2.Status(code=code_pb2.UNAVAILABLE, details=[packed(info)]))

    assert received.reason is Reason.WORKER_LOST


def test_reason_of_a_newer_mesh_becomes_the_nearest_one() -> None:
    info = error_details_pb2.ErrorInfo(reason="FROM_THE_FUTURE", domain="kvmesh")

    received = error_catalog.from_status(status_pb2.Status(code=code_pb2.NOT_FOUND, details=[packed(info)]))

    assert received.reason is Reason.NOT_FOUND


def test_ok_is_no_error() -> None:
    with pytest.raises(ValueError, match="OK"):
        error_catalog.from_status(status_pb2.Status(code=code_pb2.OK))


def rpc_error(code: grpc.StatusCode, details: bytes | None = None) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata(*([("grpc-status-details-bin", details)] if details is not None else []))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details="their words")


def test_failed_call_without_details_becomes_the_nearest_reason() -> None:
    received = error_catalog.from_rpc_error(rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED))

    assert (received.reason, received.message) == (Reason.DEADLINE, "their words")


@pytest.mark.parametrize(
    "details",
    [b"\xff\xff", status_pb2.Status(code=code_pb2.NOT_FOUND, message="their words").SerializeToString()],
    ids=["no status", "a status of another code"],
)
def test_details_that_contradict_their_call_are_ignored(details: bytes) -> None:
    received = error_catalog.from_rpc_error(rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, details))

    assert (received.reason, received.message) == (Reason.DEADLINE, "their words")


def test_openai_body_has_the_shape_its_clients_parse() -> None:
    error = FixRequestError(Reason.INVALID_FIELD, "top_p: 7 is out of range", field="top_p")

    assert error_catalog.openai_error(error) == {
        "error": {
            "message": "Invalid field: top_p: 7 is out of range",
            "type": "invalid_request_error",
            "param": "top_p",
            "code": "invalid_value",
        }
    }


def test_openai_body_of_a_lost_worker_is_the_servers_fault() -> None:
    assert error_catalog.openai_error(TryElsewhereError(Reason.WORKER_LOST, SECRET)) == {
        "error": {
            "message": "Whoever was to serve this request is gone or does not answer: retry.",
            "type": "server_error",
            "param": None,
            "code": "worker_lost",
        }
    }


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (FixRequestError(Reason.EMPTY_PROMPT, ""), Reason.EMPTY_PROMPT),
        (NotImplementedError(), Reason.UNIMPLEMENTED),
        (ExceptionGroup("tasks", [TryElsewhereError(Reason.NO_WORKERS, "")]), Reason.NO_WORKERS),
        (ExceptionGroup("tasks", [ExceptionGroup("inner", [NotImplementedError()])]), Reason.UNIMPLEMENTED),
        (ExceptionGroup("tasks", [TryElsewhereError(Reason.NO_WORKERS, ""), ValueError()]), None),
        (MeshError(Reason.INTERNAL, "ours, and a fault"), None),
        (ValueError(), None),
    ],
)
def test_foreseen_errors_are_told_from_faults(raised: Exception, reason: Reason | None) -> None:
    error = error_catalog.foreseen_error(raised)

    assert (error.reason if error is not None else None) is reason
