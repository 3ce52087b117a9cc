"""The contract keeps its own rules, and the committed code is what it generates."""

import subprocess
from pathlib import Path

import pytest
from google.api import annotations_pb2
from google.protobuf.descriptor import Descriptor, FileDescriptor

from kvmesh.etcd.v1 import etcd_pb2
from kvmesh.v1 import (
    components_pb2,
    decode_worker_pb2,
    frontend_pb2,
    generation_pb2,
    kv_transfer_pb2,
    prefill_queue_pb2,
    prefill_worker_pb2,
    processor_pb2,
    router_pb2,
    worker_control_pb2,
    worker_events_pb2,
)

ROOT = Path(__file__).parents[2]
INSTALLED = (".venv/.installed", ".venv-protos/.installed")
"""Targets of the Makefile."""
FILES: list[FileDescriptor] = [
    module.DESCRIPTOR
    for module in (
        components_pb2, decode_worker_pb2, etcd_pb2, frontend_pb2, generation_pb2, kv_transfer_pb2, prefill_queue_pb2,
        prefill_worker_pb2, processor_pb2, router_pb2, worker_control_pb2, worker_events_pb2,
    )
]  # fmt: skip
# Where a status is what the message is about, and not how its own call ended.
STATUS_FIELDS = {"kvmesh.v1.ExchangeFailed.status", "kvmesh.v1.FailRequest.error"}


def messages(file: FileDescriptor) -> list[Descriptor]:
    return list(file.message_types_by_name.values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: Path(file.name).stem)
class TestContract:
    def test_a_file_holds_one_service_at_most_and_is_listed_here(self, file: FileDescriptor) -> None:
        sources = {path.relative_to(ROOT / "protos").as_posix() for path in (ROOT / "protos").rglob("*.proto")}

        assert len(file.services_by_name) <= 1
        assert {listed.name for listed in FILES} == sources

    def test_the_zero_of_every_enum_is_unspecified(self, file: FileDescriptor) -> None:
        zeros = [enum.values_by_number[0].name for enum in file.enum_types_by_name.values()]

        assert [name for name in zeros if not name.endswith("_UNSPECIFIED")] == []

    def test_errors_are_in_no_payload(self, file: FileDescriptor) -> None:
        found = {
            field.full_name
            for message in messages(file)
            for field in message.fields
            if field.message_type is not None and field.message_type.full_name == "google.rpc.Status"
        }

        assert found <= STATUS_FIELDS

    def test_no_field_is_what_java_calls_the_bytes_of_its_neighbour(self, file: FileDescriptor) -> None:
        clashes = [
            field.full_name
            for message in messages(file)
            for field in message.fields
            if f"{field.name}_bytes" in message.fields_by_name and field.type == field.TYPE_STRING
        ]

        assert clashes == []

    def test_hashes_and_epochs_are_fixed64(self, file: FileDescriptor) -> None:
        wrong = [
            field.full_name
            for message in messages(file)
            for field in message.fields
            if (field.name.endswith(("_hash", "_hashes")) or field.name == "epoch")
            and field.message_type is None
            and field.type != field.TYPE_FIXED64
        ]

        assert wrong == []


def test_every_rpc_of_the_frontend_has_a_rest_route() -> None:
    service = frontend_pb2.DESCRIPTOR.services_by_name["Frontend"]

    missing = [rpc.name for rpc in service.methods if not rpc.GetOptions().HasExtension(annotations_pb2.http)]

    assert missing == []


@pytest.mark.skipif(not all((ROOT / stamp).exists() for stamp in INSTALLED), reason="not installed: make install-dev")
def test_the_committed_code_is_what_the_contract_generates(tmp_path: Path) -> None:
    # What is installed is taken as it is: make may not install anew beneath the tests that run beside this one.
    installed = (flag for stamp in INSTALLED for flag in ("--old-file", stamp))
    command = ["make", "--silent", *installed, "protos", f"GENERATED={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=50)

    committed, fresh = (
        {
            path.relative_to(top).as_posix(): path.read_bytes()
            for path in top.rglob("*")
            if path.suffix in (".py", ".pyi", ".binpb")
        }
        for top in (ROOT / "generated", tmp_path)
    )
    assert fresh == committed
