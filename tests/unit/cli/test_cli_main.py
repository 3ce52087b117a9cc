"""What the command line says before it calls anything: help, versions, and what is wrong with flags and settings."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvmesh.cli.main import main
from kvmesh.cli.options import default_target
from kvmesh.cli.running import engine_options
from kvmesh.runtime.settings import Settings

COMMANDS = ["up", "generate", "explain", "status", "probe", "drain", "undrain", "version", "config show"]


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVMESH_")]:
        monkeypatch.delenv(name)


def exit_code_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example_of_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(*command.split(), "--help") == 0

    assert f"Examples:\n    kvmesh {command}" in capsys.readouterr().out


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of() == 0

    out = capsys.readouterr().out
    assert all(command.split()[0] in out for command in COMMANDS)


def test_the_help_of_up_states_the_defaults_of_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings()

    exit_code_of("up", "--help")

    words = " ".join(capsys.readouterr().out.split())
    shown = dict(re.findall(r"--([a-z-]+) [A-Z]+ (?:(?! --).)*?\[default: ([^\];]+)[\];]", words))
    assert shown == {
        "decode": str(settings.mesh.decode),
        "prefill": str(settings.mesh.prefill),
        "router": settings.mesh.router,
        "processor": settings.mesh.processor,
        "policy": settings.router.policy,
        "engine": settings.engine.name,
        "model": "a small model, for numpy_llama",
        "model-name": "the engine's",
        "http-host": settings.http.host,
        "http-port": str(settings.http.port),
        "grpc-host": settings.grpc.host,
        "grpc-port": str(settings.grpc.port),
        "namespace": settings.namespace,
        "log-level": settings.log.level,
        "log-format": settings.log.format,
    }


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_the_version_is_shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(*arguments) == 0

    assert re.fullmatch(r"kvmesh \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["up", "--decod", "3"], "--decode"),
        (["up", "--prefills", "3"], "--prefill"),
        (["status", "--jsn"], "--json"),
        (["--versio"], "--version"),
        (["generate", "--max-token", "3", "hello"], "--max-tokens"),
    ],
)
def test_an_unknown_flag_is_answered_with_the_nearest(
    arguments: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(*arguments) == 2

    line = capsys.readouterr().err
    assert line.startswith("error: no such option: --")
    assert f"; the nearest is {nearest} (see kvmesh" in line


def test_a_flag_like_no_other_is_answered_with_all_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("status", "--zzz") == 2

    assert "; known: --json, --target, --timeout, --help (see" in capsys.readouterr().err


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("statu") == 2

    assert "'status'" in capsys.readouterr().err


def test_an_unknown_role_is_answered_with_what_else_can_be_served(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("serve", "hello") == 2

    assert "MODULE:CLASS, e.g. hello:Upper" in capsys.readouterr().err


def test_every_flag_that_is_not_a_roles_is_named_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("serve", "decode", "--grpc-host", "127.0.0.1", "--grpc-port", "0") == 2

    assert capsys.readouterr().err == (
        "error: --grpc-host and --grpc-port are for a frontend or MODULE:CLASS: decode listens at --host and --port\n"
    )


def test_a_flag_of_the_wrong_type_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("up", "--decode", "many") == 2

    assert capsys.readouterr().err.startswith("error: invalid value for '--decode': ")


def test_a_flag_out_of_range_is_answered_with_the_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("up", "--decode", "0") == 2

    assert capsys.readouterr().err == "error: mesh.decode = 0 (flag) is out of range: 1 to 64\n"


def test_each_fault_has_its_own_error_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("up", "--decode", "0", "--http-port", "-1") == 2

    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


def test_up_refuses_to_leave_loopback(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("up", "--http-host", "0.0.0.0") == 2

    assert "--insecure" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["total_blocks", "=512"])
def test_an_engine_option_without_key_and_value_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("up", "--engine-option", option) == 2

    assert "KEY=VALUE" in capsys.readouterr().err


def test_engine_options_are_split_at_the_first_equals_sign() -> None:
    by_key = engine_options(["total_blocks=512", "note=a=b", "empty="])

    assert by_key == {"engine.options.total_blocks": "512", "engine.options.note": "a=b", "engine.options.empty": ""}


@pytest.mark.parametrize(
    "target",
    ["127.0.0.1", "127.0.0.1:", ":50051", "127.0.0.1:port", "127.0.0.1:70000", "http://127.0.0.1:50051", "::1:50051"],
)
def test_a_target_without_host_or_port_is_refused(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("status", "--target", target) == 2

    assert "is not HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "flag", "value", "said"),
    [
        ("generate hi", "--max-tokens", "4294967296", "4294967296 is out of range: 1 to 4294967295"),
        ("generate hi", "--max-tokens", "0", "0 is out of range: 1 to 4294967295"),
        ("generate hi", "--timeout", "1e6", "1000000.0 is out of range: 0.001 to 86400"),
        ("status", "--timeout", "inf", "inf is out of range: 0.001 to 86400"),
        ("status", "--timeout", "0", "0.0 is out of range: 0.001 to 86400"),
        ("drain NODE1/prefill/0", "--timeout", "1e300", "1e+300 is out of range: 0 to 86400"),
        ("drain NODE1/prefill/0", "--timeout", "-1", "-1.0 is out of range: 0 to 86400"),
        (f"replay {__file__}", "--timeout", "nan", "nan is out of range: 0.001 to 86400"),
        (f"replay {__file__}", "--speed", "inf", "inf is out of range: 0.001 to 1000000"),
    ],
)
def test_a_number_out_of_range_is_refused_before_anything_is_called(
    command: str, flag: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(*command.split(), flag, value) == 2

    name = command.split(maxsplit=1)[0]
    assert capsys.readouterr().err == f"error: invalid value for '{flag}': {said} (see kvmesh {name} --help)\n"


@pytest.mark.parametrize(
    ("command", "bound"),
    [("generate", "1 to 4294967295"), ("status", "0.001 to 86400"), ("probe", "0.001 to 86400"), ("drain", "86400")],
)
def test_help_says_the_bounds_of_numbers(command: str, bound: str, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code_of(command, "--help")

    assert bound in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("prompt", ["- list", "-5 degrees", "--- a line", "--wrong or right?"])
def test_a_prompt_that_begins_with_a_dash_is_answered_with_how_it_is_given(
    prompt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of("generate", prompt) == 2

    assert 'kvmesh generate -- "- list"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "port", "target"),
    [
        ("", "", "127.0.0.1:50051"),
        ("", "47500", "127.0.0.1:47500"),
        ("10.0.0.7", "", "10.0.0.7:50051"),
        ("0.0.0.0", "47500", "127.0.0.1:47500"),
        ("::", "47500", "[::1]:47500"),
        ("fe80::1", "47500", "[fe80::1]:47500"),
    ],
)
def test_commands_call_where_the_environment_has_the_mesh_serve(
    host: str, port: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMESH_GRPC__HOST", host)
    monkeypatch.setenv("kvmesh_grpc__port", port)

    assert default_target() == target


def test_a_target_given_goes_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [each.getsockname()[1] for each in (one, other)]
    monkeypatch.setenv("KVMESH_GRPC__PORT", str(ports[0]))

    exit_code_of("undrain", "NODE1/decode/0")
    of_environment = capsys.readouterr().err
    exit_code_of("undrain", "NODE1/decode/0", "--target", f"127.0.0.1:{ports[1]}")

    assert of_environment.startswith(f"error: cannot reach 127.0.0.1:{ports[0]} (")
    assert capsys.readouterr().err.startswith(f"error: cannot reach 127.0.0.1:{ports[1]} (")


def test_a_default_target_of_any_free_port_is_refused_by_the_variables_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVMESH_GRPC__PORT", "0")

    assert exit_code_of("status") == 2

    assert "KVMESH_GRPC__PORT make '127.0.0.1:0'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["127.0.0.1"],
        ["127.0.0.1:1", "--servic", "x"],
        ["127.0.0.1:1", "--timeout", "0"],
        ["127.0.0.1:1", "--timeout", "1e10"],
    ],
)
def test_probe_exits_1_on_bad_flags(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("probe", *arguments) == 1

    assert capsys.readouterr().err.startswith("error: ")


def test_config_show_tells_where_each_value_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text("engine: {name: simulated, options: {total_blocks: 512}}\n")
    monkeypatch.setenv("KVMESH_MESH__DECODE", "4")

    assert exit_code_of("config", "show", "--config", str(file)) == 0

    lines = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["setting", "value", "from"]
    assert ["engine.name", "simulated", f"file {file}"] in lines
    assert ["engine.options.total_blocks", "512", f"file {file}"] in lines
    assert ["mesh.decode", "4", "env KVMESH_MESH__DECODE"] in lines
    assert ["mesh.prefill", "1", "default"] in lines


def test_config_show_prints_values_that_a_setting_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVMESH_ROUTER__INDEX", "off")
    monkeypatch.setenv("KVMESH_PROCESS__TRANSPORTS", "nixl,tcp")
    monkeypatch.setenv("KVMESH_MESH__PROCESSES", "true")

    assert exit_code_of("config", "show") == 0

    out = capsys.readouterr().out
    lines = [re.split(r" {2,}", line.strip()) for line in out.splitlines()]
    assert ["router.index", "off", "env KVMESH_ROUTER__INDEX"] in lines
    assert ["process.transports", "nixl,tcp", "env KVMESH_PROCESS__TRANSPORTS"] in lines
    assert ["mesh.processes", "true", "env KVMESH_MESH__PROCESSES"] in lines
    assert ["router.seed", "default"] in lines
    assert ["mesh.node_names", "default"] in lines
    assert not re.search(r"None|IndexMode|[(\[{]", out)


def test_config_show_refuses_a_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of("config", "show", "--config", str(tmp_path / "none.toml")) == 2

    assert "no such settings file" in capsys.readouterr().err


def test_help_loads_neither_grpc_nor_settings_nor_rich() -> None:
    check = (
        "import sys; from kvmesh.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'grpc', 'rich', 'pydantic', 'structlog', 'asyncio'} & sys.modules.keys()), file=sys.stderr)"
    )

    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=30)

    assert run.stderr == "[]\n"
