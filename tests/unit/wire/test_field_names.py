"""A field of a refusal is called as the door's own message calls it."""

import pytest

from kvmesh.core.errors import FixRequestError, MeshError, Reason
from kvmesh.gateway.openai_schema import ChatRequest, CompletionRequest
from kvmesh.wire.field_names import IN_GENERATE, IN_GENERATE_TEXT, fields_named


@pytest.mark.parametrize(
    ("names", "field", "called"),
    [
        (IN_GENERATE, "query.hints.pinned_worker_id", "routing.pinned_worker_id"),
        (IN_GENERATE, "query.model", "model"),
        (IN_GENERATE, "token_ids[3]", "prompt.token_ids[3]"),
        (IN_GENERATE, "query.hintsight", "query.hintsight"),
        (IN_GENERATE, "prompt.text", "prompt.text"),
        (IN_GENERATE_TEXT, "prompt.text", "prompt"),
        (IN_GENERATE_TEXT, "query.hints.required_labels", "routing.required_labels"),
        (IN_GENERATE_TEXT, "query.model", "model"),
        (ChatRequest.mesh_fields, "prompt.messages.messages[1].role", "messages[1].role"),
        (ChatRequest.mesh_fields, "prompt.messages", "messages"),
        (ChatRequest.mesh_fields, "prompt", "messages"),
        (ChatRequest.mesh_fields, "model", "model"),
        (ChatRequest.mesh_fields, "query.model", "model"),
        (CompletionRequest.mesh_fields, "query.model", "model"),
        (CompletionRequest.mesh_fields, "prompt.token_ids", "prompt"),
        (CompletionRequest.mesh_fields, "sampling.logprobs", "logprobs"),
        (ChatRequest.mesh_fields, "sampling.response_format", "response_format"),
    ],
)
def test_the_longest_start_that_is_known_is_renamed(names: dict[str, str], field: str, called: str) -> None:
    with pytest.raises(FixRequestError) as refused, fields_named(names):
        raise FixRequestError(Reason.INVALID_FIELD, f"{field}: too long", field=field)

    assert (refused.value.field, refused.value.message) == (called, f"{called}: too long")


def test_an_error_that_names_no_field_passes_as_it_is() -> None:
    with pytest.raises(MeshError) as failed, fields_named({"": "x"}):
        raise MeshError(Reason.INTERNAL, "text: broke")

    assert (failed.value.field, failed.value.message) == (None, "text: broke")
