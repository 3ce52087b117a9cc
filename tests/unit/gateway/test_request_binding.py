"""The body of a request where it is one field of the message, and not all of it."""

import re

import pytest

from kvmesh.core.errors import FixRequestError
from kvmesh.gateway.request_binding import bind_request
from kvmesh.gateway.routes import HttpRule
from kvmesh.v1 import frontend_pb2

SAMPLING_AS_BODY = HttpRule(
    verb="POST",
    template="/sampling",
    body="sampling",
    method=frontend_pb2.DESCRIPTOR.services_by_name["Frontend"].methods_by_name["Generate"],
    pattern=re.compile("/sampling"),
    variables=(),
)


async def test_the_body_is_the_field() -> None:
    request = await bind_request(SAMPLING_AS_BODY, path_values={}, query=b"", body=b'{"seed": 3}')

    assert isinstance(request, frontend_pb2.GenerateRequest)
    assert request.sampling.seed == 3


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"[]", "sampling: must be a JSON object"),
        (b'{"top_p": true}', "sampling.top_p: must be a number"),
        (b'{"stop": ["a", 1e999]}', "sampling.stop[1]: the number is out of range at line 1 column 16"),
        (b"1e999", "sampling: the number is out of range at line 1 column 1"),
    ],
)
async def test_what_is_wrong_in_it_is_named_from_the_request_on(body: bytes, told: str) -> None:
    with pytest.raises(FixRequestError) as refused:
        await bind_request(SAMPLING_AS_BODY, path_values={}, query=b"", body=body)

    assert refused.value.message == told
