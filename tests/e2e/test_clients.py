"""docs/clients.md as its readers follow it, and the example in Node: clients that know the contract and no more."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from google.protobuf.compiler import plugin_pb2

from kvmesh.runtime.component_loading import load_graph
from kvmesh.testing.mesh_process import PROGRAM, WAIT_S, MeshProcess, clean_environment, run_kvmesh
from kvmesh.testing.sdk import ServedComponents, serving

ROOT = Path(__file__).parents[2]
NODE_CLIENT = ROOT / "examples" / "clients" / "node"
PAGE = (ROOT / "docs" / "clients.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
ON_THE_PATH = os.pathsep.join(
    (str(Path(PROGRAM).parent), str(ROOT / "node_modules" / ".bin"), os.environ.get("PATH", os.defpath))
)
NEEDS = {
    "buf": "buf is not installed: make proto-lint",
    "grpcurl": "grpcurl is not installed",
    "node": "node is not installed",
}
"""First words of commands whose program may be absent."""


def commands() -> list[object]:
    """Return the commands of the page with the answers that stand under them."""
    return [
        pytest.param(command, answer, id=command.split(" -d")[0].strip()[:60])
        for (kind, command), (_, answer) in pairwise(BLOCKS)
        if kind == "sh"
    ]


def require_node_modules() -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (NODE_CLIENT / "node_modules" / "@grpc").exists():
        pytest.skip("the client's modules are not installed: make install-node")


def run_shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env=clean_environment(PATH=ON_THE_PATH),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def node(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["node", str(NODE_CLIENT / script), *arguments], capture_output=True, text=True, timeout=WAIT_S, check=False
    )


@pytest.fixture(scope="module")
def mesh() -> Iterator[MeshProcess]:
    (serve,) = [text for kind, text in BLOCKS if kind == "" and text.startswith("kvmesh up")]
    with MeshProcess(*serve.split()[2:]) as process:
        yield process


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, mesh: MeshProcess) -> Path:
    """Return a folder that looks like a checkout's root, with the files of the page."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("examples", "generated", "protos"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "build" / "stubs").mkdir(parents=True)
    for kind, text in BLOCKS:
        if kind == "python":
            name = text.split("\n", 1)[0].removeprefix("# ")
            (folder / name).write_text(text.replace("127.0.0.1:50051", mesh.grpc_address))
    return folder


@pytest.mark.parametrize(("command", "answer"), commands())
def test_a_command_of_the_page_answers_as_it_says(mesh: MeshProcess, checkout: Path, command: str, answer: str) -> None:
    program = command.split(maxsplit=1)[0]
    if program in NEEDS and shutil.which(program, path=ON_THE_PATH) is None:
        pytest.skip(NEEDS[program])
    if "examples/clients/node" in command:
        require_node_modules()
    if "grpc_tools" in command:
        stubs_python = ROOT / ".venv-protos" / "bin" / "python"
        if not stubs_python.exists():
            pytest.skip("grpcio-tools is not installed: make install-dev")
        command = command.replace("python", str(stubs_python), 1)
    here = command.replace("127.0.0.1:8000", mesh.http_url.removeprefix("http://"))

    done = run_shell(here.replace("127.0.0.1:50051", mesh.grpc_address), checkout)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer.strip()


def test_stubs_made_of_the_committed_contract_are_importable(checkout: Path) -> None:
    stubs_python = ROOT / ".venv-protos" / "bin" / "python"
    if not stubs_python.exists():
        pytest.skip("grpcio-tools is not installed: make install-dev")
    (command,) = [text for kind, text in BLOCKS if kind == "sh" and "grpc_tools" in text]
    made = run_shell(command.replace("python", str(stubs_python), 1), checkout)
    assert made.returncode == 0, made.stderr

    shown = subprocess.run(
        [sys.executable, "-c", "import kvmesh.v1.frontend_pb2_grpc as stubs; print(stubs.__file__)"],
        env=clean_environment(PYTHONPATH=str(checkout / "build" / "stubs")),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )

    assert shown.returncode == 0, shown.stderr
    assert Path(shown.stdout.strip()) == checkout / "build" / "stubs" / "kvmesh" / "v1" / "frontend_pb2_grpc.py"


# Stands where a plugin of a compiler would: keeps what it is asked, and makes nothing of it.
ASKED = """#!/bin/sh
cat > "$0.request"
"""


@pytest.mark.parametrize(
    ("plugin", "option", "ours", "googles"),
    [
        ("protoc-gen-go-grpc", "go_package", "example.com/yours/gen/kvmesh/v1;kvmeshv1", "google.golang.org/genproto/"),
        ("protoc-gen-grpc-java", "java_package", "com.example.kvmesh.v1", "com.google.api"),
    ],
    ids=["go", "java"],
)
def test_buf_puts_the_readers_package_into_the_contract_and_leaves_googles(
    tmp_path: Path, plugin: str, option: str, ours: str, googles: str
) -> None:
    if shutil.which("buf", path=ON_THE_PATH) is None:
        pytest.skip(NEEDS["buf"])
    (template,) = [text for kind, text in BLOCKS if kind == "yaml" and plugin in text]
    others = ("protoc_builtin", "local: protoc-gen-go,")  # compilers of their own, which need not be here
    kept = [line for line in template.splitlines() if not any(other in line for other in others)]
    (tmp_path / "buf.gen.yaml").write_text("\n".join(kept))
    (tmp_path / plugin).write_text(ASKED)
    (tmp_path / plugin).chmod(0o755)
    (command,) = {
        line.replace("KVMESH", str(ROOT))
        for kind, text in BLOCKS
        for line in text.splitlines()
        if kind == "" and line.startswith("buf generate")
    }

    done = run_shell(f'PATH="$PWD:$PATH" {command}', tmp_path)

    assert done.returncode == 0, done.stderr
    asked = plugin_pb2.CodeGeneratorRequest.FromString((tmp_path / f"{plugin}.request").read_bytes())
    packages = {file.name: getattr(file.options, option) for file in asked.proto_file}
    assert "kvmesh/v1/frontend.proto" in asked.file_to_generate
    assert {packages[name] for name in asked.file_to_generate} == {ours}
    assert packages["google/api/annotations.proto"].startswith(googles)


class TestNode:
    def test_a_refusal_is_read_as_a_typed_error(self, mesh: MeshProcess) -> None:
        require_node_modules()

        done = node("client.js", mesh.grpc_address, "")

        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.strip() in (NODE_CLIENT / "README.md").read_text()
        assert done.stderr.startswith("INVALID_ARGUMENT kvmesh/EMPTY_PROMPT prompt.text: ")

    def test_a_mesh_that_is_not_there_is_an_error_without_a_reason(self) -> None:
        require_node_modules()

        done = node("client.js", "127.0.0.1:1", "Hello")

        assert done.returncode == 1
        assert done.stderr.startswith("UNAVAILABLE: ")

    def test_the_client_is_short(self) -> None:
        lines = (NODE_CLIENT / "client.js").read_text().splitlines()

        assert len(lines) <= 45


@pytest.fixture
async def component(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ServedComponents]:
    """Serve the example of the SDK guide that has one method of each kind."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "basic_worker"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    async with serving(load_graph("basic_worker:YourWorker")) as served:
        yield served


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file that `kvmesh proto` prints."""
    shown = run_kvmesh("proto", "basic_worker:YourWorker", PYTHONPATH=str(ROOT / "examples" / "basic_worker"))
    assert shown.returncode == 0, shown.stderr
    path = tmp_path_factory.mktemp("contract") / "worker.proto"
    path.write_text(shown.stdout)
    return path


class TestComponentFromNode:
    SERVICE = "sdk.your_namespace.your_worker.YourWorker"

    async def call(
        self, component: ServedComponents, contract: Path, method: str, request: object
    ) -> subprocess.CompletedProcess[str]:
        require_node_modules()
        arguments = (component.grpc_address, str(contract), f"{self.SERVICE}/{method}", json.dumps(request))
        return await asyncio.to_thread(node, "component.js", *arguments)

    async def test_a_method_that_answers_once(self, component: ServedComponents, contract: Path) -> None:
        done = await self.call(component, contract, "shout", {"text": "hello"})

        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout) == {"text": "HELLO"}

    async def test_a_method_that_streams(self, component: ServedComponents, contract: Path) -> None:
        done = await self.call(component, contract, "generate", {"text": "from a client"})

        assert (done.returncode, done.stderr) == (0, "")
        assert [json.loads(line) for line in done.stdout.splitlines()] == [
            {"text": "from"},
            {"text": "a"},
            {"text": "client"},
        ]

    async def test_a_request_of_the_wrong_shape_is_refused_by_its_field(
        self, component: ServedComponents, contract: Path
    ) -> None:
        done = await self.call(component, contract, "shout", {})

        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("INVALID_ARGUMENT: ")
        assert "text" in done.stderr
