"""What the settings tree accepts, and what it says when it does not."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from kvmesh.core.waits import Waits
from kvmesh.runtime.settings import MeshSettings, Settings, SettingsError, is_loopback, load_settings


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVMESH_")]:
        monkeypatch.delenv(name)


def fault_of(**overrides: object) -> str:
    """Return the text that refuses these flags, given with __ for the dot."""
    with pytest.raises(SettingsError) as refusal:
        load_settings(overrides={key.replace("__", "."): value for key, value in overrides.items()})
    return str(refusal.value)


def test_defaults_are_a_loopback_mesh_of_two_decode_workers_and_one_prefill_worker() -> None:
    settings = load_settings().settings

    assert (settings.mesh.decode, settings.mesh.prefill) == (2, 1)
    assert (settings.http.host, settings.http.port) == ("127.0.0.1", 8000)
    assert (settings.grpc.host, settings.grpc.port) == ("127.0.0.1", 50051)
    assert (settings.engine.name, settings.router.policy) == ("numpy_llama", "least_work")
    assert settings.process.transports == ("nixl", "shared_memory", "tcp")


def test_settings_made_in_code_do_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_MESH__DECODE", "7")

    assert Settings().mesh.decode == 2


def test_settings_are_frozen() -> None:
    settings = Settings()

    with pytest.raises(ValidationError):
        settings.mesh.decode = 3

    assert settings.mesh.decode == 2


@pytest.mark.parametrize(
    ("key", "value", "range_text"),
    [
        ("mesh__decode", 0, "1 to 64"),
        ("mesh__decode", 65, "1 to 64"),
        ("mesh__prefill", -1, "0 to 64"),
        ("http__port", 65_536, "0 to 65535"),
        ("queue__lease_ttl_s", 0, "above 0 to 3600"),
        ("router__seed", 2**64, f"0 to below {2**64}"),
        ("engine__speedup", -0.5, "0 to 1000000"),
    ],
)
def test_a_value_out_of_range_is_answered_with_the_range(key: str, value: float, range_text: str) -> None:
    assert fault_of(**{key: value}) == f"{key.replace('__', '.')} = {value} (flag) is out of range: {range_text}"


def test_a_wait_out_of_range_is_answered_with_the_range() -> None:
    assert fault_of(waits__route_s=0.0) == "waits.route_s = 0.0 (flag) is out of range: above 0 and up to 86400 seconds"


def test_waits_are_the_core_s_own_object() -> None:
    settings = load_settings(overrides={"waits.route_s": 0.5}).settings

    assert settings.waits == Waits(route_s=0.5)


def test_a_value_outside_a_choice_is_answered_with_the_choices() -> None:
    fault = fault_of(log__level="loud")

    assert fault.startswith("log.level = 'loud' (flag): ")
    assert all(level in fault for level in ("debug", "info", "warning", "error", "critical"))


def test_a_value_of_the_wrong_type_is_named_with_its_key() -> None:
    assert fault_of(mesh__decode="many").startswith("mesh.decode = 'many' (flag): ")


def test_every_fault_is_told_at_once() -> None:
    faults = fault_of(mesh__decode=0, http__port=-1).splitlines()

    assert sorted(line.split(" = ")[0] for line in faults) == ["http.port", "mesh.decode"]


@pytest.mark.parametrize("key", ["http", "grpc"])
def test_leaving_loopback_is_refused_and_the_refusal_names_the_way_out(key: str) -> None:
    fault = fault_of(**{f"{key}__host": "0.0.0.0"})

    assert fault.startswith(f"{key}.host = '0.0.0.0' (flag) leaves loopback")
    assert "--insecure" in fault


def test_insecure_allows_to_leave_loopback() -> None:
    settings = load_settings(overrides={"grpc.host": "0.0.0.0", "insecure": True}).settings

    assert settings.grpc.host == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.7", False),
        ("gpu-1.example.com", False),
        ("", False),
    ],
)
def test_loopback_is_what_only_this_machine_can_reach(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_two_doors_on_one_port_are_refused() -> None:
    assert fault_of(http__port=9000, grpc__port=9000) == "http.port = grpc.port = 9000: the two doors need a port each"


def test_any_free_port_is_another_for_each_door() -> None:
    settings = load_settings(overrides={"http.port": 0, "grpc.port": 0}).settings

    assert (settings.http.port, settings.grpc.port) == (0, 0)


def test_node_labels_are_those_of_the_node() -> None:
    mesh = load_settings(overrides={"mesh.node_labels": ["A:zone=a", "A:tier=x=y", "B:zone=b"]}).settings.mesh

    assert mesh.labels_of("A") == {"zone": "a", "tier": "x=y"}
    assert mesh.labels_of("C") == {}
    assert "'A:zone' is not NODE:KEY=VALUE" in fault_of(mesh__node_labels="A:zone")


def test_node_names_are_split_at_commas_and_taken_round_robin() -> None:
    mesh = load_settings(overrides={"mesh.node_names": "A, B"}).settings.mesh

    assert [mesh.node_name(index) for index in range(3)] == ["A", "B", "A"]


def test_unnamed_nodes_are_numbered_from_one() -> None:
    assert [MeshSettings().node_name(index) for index in range(3)] == ["NODE1", "NODE2", "NODE3"]


@pytest.mark.parametrize("names", ["A,,B", "A/B", "A\tB", ","])
def test_node_names_that_cannot_be_part_of_an_id_are_refused(names: str) -> None:
    assert fault_of(mesh__node_names=names).startswith("mesh.node_names (flag): ")


def test_engine_options_become_text_whatever_a_file_writes(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("[engine.options]\ntotal_blocks = 512\nspeedup = 0.5\nfast = true\nids = '1,2'\n")

    options = load_settings(config_file=file).settings.engine.options

    assert options == {"total_blocks": "512", "speedup": "0.5", "fast": "true", "ids": "1,2"}
