"""Where settings come from, which source wins, and how misspelt names are answered."""

import os
from pathlib import Path

import pytest

from kvmesh.runtime.settings import SettingsError, load_settings


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVMESH_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    file = tmp_path / "mesh.toml"
    file.write_text("[mesh]\ndecode = 3\nprefill = 3\n[http]\nport = 3000\n[grpc]\nport = 3001\n")
    return file


def test_a_later_source_wins_and_each_key_keeps_its_origin(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_MESH__PREFILL", "4")
    monkeypatch.setenv("KVMESH_HTTP__PORT", "4000")

    loaded = load_settings(config_file=toml, overrides={"http.port": 5000})

    values = (loaded.settings.queue.max_attempts, loaded.settings.mesh.decode, loaded.settings.mesh.prefill)
    assert values == (3, 3, 4)
    assert loaded.settings.http.port == 5000
    assert loaded.origins["queue.max_attempts"] == "default"
    assert loaded.origins["mesh.decode"] == f"file {toml}"
    assert loaded.origins["mesh.prefill"] == "env KVMESH_MESH__PREFILL"
    assert loaded.origins["http.port"] == "flag"


def test_yaml_and_toml_say_the_same(tmp_path: Path) -> None:
    toml, yaml = tmp_path / "a.toml", tmp_path / "a.yaml"
    toml.write_text("namespace = 'blue'\n[mesh]\nnode_names = ['A', 'B']\n[engine.options]\ntotal_blocks = 512\n")
    yaml.write_text("namespace: blue\nmesh: {node_names: [A, B]}\nengine:\n  options:\n    total_blocks: 512\n")

    assert load_settings(config_file=toml).settings == load_settings(config_file=yaml).settings


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[mesh]\ndecod = 3\n", "mesh.decod (file {file}) is not a setting; the nearest is mesh.decode"),
        ("[htpp]\nport = 3\n", "htpp.port (file {file}) is not a setting; the nearest is http.port"),
        ("insecur = true\n", "insecur (file {file}) is not a setting; the nearest is insecure"),
        ("[waits]\nroute = 3\n", "waits.route (file {file}) is not a setting; the nearest is waits.route_s"),
    ],
)
def test_an_unknown_key_of_a_file_is_answered_with_the_nearest(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(text)

    with pytest.raises(SettingsError) as refusal:
        load_settings(config_file=file)

    assert str(refusal.value) == fault.format(file=file)


def test_an_unknown_variable_is_answered_with_the_nearest_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_MESH__DECODERS", "4")

    with pytest.raises(SettingsError) as refusal:
        load_settings()

    assert str(refusal.value) == (
        "KVMESH_MESH__DECODERS (env KVMESH_MESH__DECODERS) is not a setting; the nearest is KVMESH_MESH__DECODE"
    )


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("KVMESH_LOG__QZX", "its section has KVMESH_LOG__LEVEL, KVMESH_LOG__FORMAT"),
        ("KVMESH_QZX", "`kvmesh config show` lists all"),
    ],
)
def test_a_variable_like_no_other_is_not_answered_with_a_far_one(
    variable: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "4")

    with pytest.raises(SettingsError) as refusal:
        load_settings()

    assert str(refusal.value) == f"{variable} (env {variable}) is not a setting; {hint}"


def test_variables_of_a_kubernetes_service_of_our_name_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for start in ("KVMESH", "KVMESH_FRONTEND", "KVMESH_MY_ETCD"):
        monkeypatch.setenv(f"{start}_SERVICE_HOST", "10.96.0.7")
        monkeypatch.setenv(f"{start}_SERVICE_PORT", "8000")
        monkeypatch.setenv(f"{start}_SERVICE_PORT_GRPC_WEB", "50051")
        monkeypatch.setenv(f"{start}_PORT", "tcp://10.96.0.7:8000")
        monkeypatch.setenv(f"{start}_PORT_8000_TCP", "tcp://10.96.0.7:8000")
        for last, value in (("PROTO", "tcp"), ("PORT", "8000"), ("ADDR", "10.96.0.7")):
            monkeypatch.setenv(f"{start}_PORT_8000_TCP_{last}", value)
    monkeypatch.setenv("KVMESH_HTTP__PORT", "3000")

    loaded = load_settings()

    assert loaded.settings.http.port == 3000
    assert {origin for key, origin in loaded.origins.items() if key != "http.port"} == {"default"}


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("KVMESH_PORT", "8000"),
        ("KVMESH_HTTP_PORT", "8000"),
        ("KVMESH_SERVICE__HOST", "10.96.0.7"),
        ("KVMESH_PORT_HTTP_TCP", "tcp://10.96.0.7:8000"),
    ],
)
def test_what_kubernetes_would_not_write_so_is_still_refused(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)

    with pytest.raises(SettingsError, match=f"{variable} .* is not a setting"):
        load_settings()


def test_a_section_given_a_value_is_answered_with_its_settings(toml: Path) -> None:
    toml.write_text("log = 'debug'\n")

    with pytest.raises(SettingsError, match=r"is a section, not a setting: it has log\.level, log\.format"):
        load_settings(config_file=toml)


def test_an_empty_section_of_a_yaml_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text("mesh:\n  # decode: 4\nhttp:\n  port: 3000\n")

    loaded = load_settings(config_file=file)

    assert (loaded.settings.mesh.decode, loaded.settings.http.port) == (2, 3000)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    for name in ("mesh.yaml", "mesh.toml"):
        file = tmp_path / name
        file.write_text("")

        assert set(load_settings(config_file=file).origins.values()) == {"default"}


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_MESH__DECODE", "")

    assert load_settings().origins["mesh.decode"] == "default"


def test_lists_in_the_environment_are_split_at_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_MESH__NODE_NAMES", "A,B")

    assert load_settings().settings.mesh.node_names == ["A", "B"]


def test_a_table_merges_entry_by_entry_over_all_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("[engine.options]\ntotal_blocks = 1\nblock_size = 1\nspeedup = 1\n")
    monkeypatch.setenv("KVMESH_ENGINE__OPTIONS", '{"block_size": 2, "speedup": 2}')

    loaded = load_settings(config_file=file, overrides={"engine.options.speedup": "3"})

    assert loaded.settings.engine.options == {"total_blocks": "1", "block_size": "2", "speedup": "3"}
    assert loaded.origins["engine.options.total_blocks"] == f"file {file}"
    assert loaded.origins["engine.options.block_size"] == "env KVMESH_ENGINE__OPTIONS"
    assert loaded.origins["engine.options.speedup"] == "flag"


def test_one_entry_of_a_table_can_be_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_ENGINE__OPTIONS__TOTAL_BLOCKS", "512")

    loaded = load_settings()

    assert loaded.settings.engine.options == {"total_blocks": "512"}
    assert loaded.origins["engine.options.total_blocks"] == "env KVMESH_ENGINE__OPTIONS__TOTAL_BLOCKS"


def test_a_value_out_of_range_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_MESH__DECODE", "0")

    with pytest.raises(SettingsError) as refusal:
        load_settings()

    assert str(refusal.value) == "mesh.decode = '0' (env KVMESH_MESH__DECODE) is out of range: 1 to 64"


def test_faults_of_all_sources_are_told_at_once(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml.write_text("[mesh]\ndecod = 3\n")
    monkeypatch.setenv("KVMESH_GRPC__PROT", "1")

    with pytest.raises(SettingsError) as refusal:
        load_settings(config_file=toml)

    assert [line.split(" ")[0] for line in str(refusal.value).splitlines()] == ["mesh.decod", "KVMESH_GRPC__PROT"]


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("mesh.ini", "", "a settings file ends in .toml, .yaml or .yml"),
        ("mesh.toml", None, "no such settings file"),
        ("mesh.toml", "[mesh\n", "cannot be read: "),
        ("mesh.yaml", "mesh: [\n", "cannot be read: "),
        ("mesh.yaml", "- 1\n- 2\n", "cannot be read: it holds no sections, as in `mesh: {decode: 4}`"),
        ("mesh.yaml", "text\n", "cannot be read: it holds no sections, as in `mesh: {decode: 4}`"),
        ("mesh.yaml", "[" * 5_000, "cannot be read: it is nested too deep"),
        (
            "mesh.yaml",
            "mesh:\n  decode: 1\nmesh:\n  prefill: 0\n",
            "cannot be read: line 3: mesh is there already, in line 1: keep one of them",
        ),
        (
            "mesh.yaml",
            "mesh:\n  decode: 1\n  'decode': 2\n",
            "cannot be read: line 3: decode is there already, in line 2: keep one of them",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, text: str | None, fault: str) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text)

    with pytest.raises(SettingsError) as refusal:
        load_settings(config_file=file)

    assert str(refusal.value).startswith(f"{file}: {fault}")
    assert "\n" not in str(refusal.value)


def test_a_key_that_is_over_what_a_merge_brings_is_no_repeated_one(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text("http: &door {host: 127.0.0.1, port: 4000}\ngrpc: {<<: *door, port: 4001}\n")

    settings = load_settings(config_file=file).settings

    assert (settings.http.port, settings.grpc.host, settings.grpc.port) == (4000, "127.0.0.1", 4001)


def test_a_file_that_is_not_utf_8_is_told_so(tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_bytes("namespace: bl\u00e4u\n".encode("latin-1"))

    with pytest.raises(SettingsError, match="cannot be read: 'utf-8' codec"):
        load_settings(config_file=file)


def test_a_wait_out_of_range_names_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text("[waits]\nroute_s = inf\n")

    with pytest.raises(SettingsError) as refusal:
        load_settings(config_file=file)

    assert str(refusal.value) == (f"waits.route_s = inf (file {file}) is out of range: above 0 and up to 86400 seconds")


def test_a_wait_out_of_range_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_WAITS__DRAIN_S", "-1")

    with pytest.raises(SettingsError) as refusal:
        load_settings()

    assert str(refusal.value) == (
        "waits.drain_s = -1.0 (env KVMESH_WAITS__DRAIN_S) is out of range: above 0 and up to 86400 seconds"
    )


def test_a_host_that_leaves_loopback_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_HTTP__HOST", "0.0.0.0")

    with pytest.raises(SettingsError, match=r"^http\.host = '0\.0\.0\.0' \(env KVMESH_HTTP__HOST\) leaves loopback"):
        load_settings()


def test_json_that_cannot_be_read_names_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMESH_ENGINE__OPTIONS", "{total_blocks: 1")

    with pytest.raises(SettingsError, match=r"KVMESH_\* environment: .* written as JSON"):
        load_settings()
