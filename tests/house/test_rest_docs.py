"""What docs/rest.md lists is what the contract's annotations serve."""

import re
from pathlib import Path

from kvmesh.gateway.call_metadata import MAX_METADATA_BYTES
from kvmesh.gateway.request_binding import MAX_QUERY_PARAMETERS
from kvmesh.gateway.routes import rules_of
from kvmesh.gateway.server import MAX_HEAD_BYTES
from kvmesh.v1 import frontend_pb2, prefill_queue_pb2, router_pb2, worker_control_pb2

TEXT = (Path(__file__).parents[2] / "docs" / "rest.md").read_text()
FILES = [frontend_pb2, prefill_queue_pb2, router_pb2, worker_control_pb2]


def test_every_route_is_listed_with_its_method() -> None:
    rows = re.findall(r"^\| ([A-Z]+) \| `([^`]+)` \| (\w+)\.(\w+) \| (stream)? ?\|$", TEXT, re.M)

    rules = rules_of(service for file in FILES for service in file.DESCRIPTOR.services_by_name.values())
    assert sorted(rows) == sorted(
        (
            rule.verb,
            rule.template,
            rule.method.containing_service.name,
            rule.method.name,
            "stream" if rule.method.server_streaming else "",
        )
        for rule in rules
    )


def test_the_limits_are_those_of_the_code() -> None:
    assert f"Up to {MAX_QUERY_PARAMETERS:,} parameters" in TEXT
    assert f"{MAX_METADATA_BYTES // 1024} KiB, and line and headers up to {MAX_HEAD_BYTES // 1024} KiB" in " ".join(
        TEXT.split()
    )
