"""The sides of a comparison: each some processes on this machine that answer HTTP on one port."""

import contextlib
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peers.load import Shape

OURS = (
    "{kvmesh} up --engine simulated --model {model} --model-name {name} --decode {workers} --prefill 0 "
    "--http-port {port} --grpc-port 0 --log-format json --log-level warning"
)
"""Our side's command; what a case needs of the engine is added to it."""
_BLOCK_SIZE = 64  # the default of both sides
_PEER_UNPACED = 1e6
"""A speedup; 0 is paced like 1 by the mocker of 1.6.1."""
_READY_S = 90.0
_STOP_S = 20.0
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Pace:
    """How long the simulated steps take."""

    step_s: float | None = None
    """Of ours, whatever is in a step; None = as fast as the machine can. The peer's model has its own times."""
    peer_speedup: float = 1.0
    """By which the peer's times are divided, where ours are not None."""

    def our_options(self) -> list[str]:
        """Return the flags of our engine."""
        if self.step_s is None:
            return ["--speedup", "0"]
        options = {
            "step_base_s": self.step_s,
            "decode_s_per_sequence": 0,
            "decode_s_per_block": 0,
            "prefill_tokens_per_s": 1e12,
        }
        return ["--speedup", "1", *engine_options(options)]


def engine_options(options: Mapping[str, object]) -> list[str]:
    """Return the flags that set them."""
    return [part for name, value in options.items() for part in ("--engine-option", f"{name}={value}")]


class Side:
    """Some processes, their children, and the port they serve on."""

    def __init__(self, name: str, work: Path) -> None:
        """Keep what the processes say in `work`."""
        self.name = name
        self.port = free_port()
        self._work = work
        self._processes: list[subprocess.Popen[bytes]] = []

    def spawn(self, command: Sequence[str], *, environment: dict[str, str] | None = None) -> None:
        """Start one process."""
        log = self._work / f"{self.name}-{self.port}-{len(self._processes)}.log"
        with log.open("wb") as output:
            self._processes.append(
                subprocess.Popen(
                    command, stdout=output, stderr=output, cwd=self._work, env={**os.environ, **(environment or {})}
                )
            )

    def wait_ready(self, shape: Shape) -> None:
        """Wait for the first good answer. Raises: SystemExit if none comes."""
        body = json.dumps({**shape.body(0), "stream": False, "max_tokens": 1})
        until = time.monotonic() + _READY_S
        while time.monotonic() < until and all(process.poll() is None for process in self._processes):
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._post(body) == 200:
                    return
            time.sleep(0.1)
        sys.exit(f"{self.name} did not become ready; it wrote:\n" + "\n".join(self._last_lines()))

    def cpu_s(self) -> float:
        """Return the CPU seconds of every process of the side so far, children of children included."""
        times, children = process_table()
        found = [process.pid for process in self._processes]
        for pid in found:
            found += children[pid]
        return sum(times.get(pid, 0) for pid in found) / _CLOCK_TICKS

    def stop(self) -> None:
        """End what it started; each process ends its own children."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _post(self, body: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            return connection.getresponse().status
        finally:
            connection.close()

    def _last_lines(self) -> list[str]:
        logs = sorted(self._work.glob(f"{self.name}-{self.port}-*.log"))
        return [line for log in logs for line in log.read_text(errors="replace").splitlines()[-10:]]


def process_table() -> tuple[dict[int, int], dict[int, list[int]]]:
    """Return clock ticks by process, those of its ended children included, and children by process."""
    times: dict[int, int] = {}
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has ended
        times[int(entry.name)] = sum(map(int, fields[11:15]))
        children[int(fields[1])].append(int(entry.name))
    return times, children


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def our_side(
    command: str, *, pace: Pace, model: Path, shape: Shape, workers: int, work: Path, prefix: Sequence[str] = ()
) -> Iterator[Side]:
    """Serve with ours; `prefix` is what runs the command, such as a profiler."""
    side = Side("ours", work)
    filled = command.format(
        kvmesh=shlex.quote(str(Path(sys.executable).with_name("kvmesh"))),
        model=shlex.quote(str(model)),
        name=shape.model,
        workers=workers,
        port=side.port,
    )
    # The special tokens have no text: a request that draws them would have fewer events with text than tokens.
    options = engine_options({"output_token_ids": "5-31999", "block_size": _BLOCK_SIZE})
    try:
        side.spawn([*prefix, *shlex.split(filled), *options, *pace.our_options()])
        side.wait_ready(shape)
        yield side
    finally:
        side.stop()


@contextmanager
def dynamo_side(python: Path, *, pace: Pace, model: Path, shape: Shape, workers: int, work: Path) -> Iterator[Side]:
    """Serve with Dynamo: its frontend with KV routing and one mocker process per worker, found through files."""
    side = Side("dynamo", work)
    environment = {
        "DYN_FILE_KV": str(work / f"discovery-{side.port}"),
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
        "DYN_EVENT_PLANE_HOST": "127.0.0.1",
        "DYN_LOG": "warn",
        "HF_HUB_OFFLINE": "1",
    }
    Path(environment["DYN_FILE_KV"]).mkdir()
    speedup = _PEER_UNPACED if pace.step_s is None else pace.peer_speedup
    frontend = (
        f"-m dynamo.frontend --http-host 127.0.0.1 --http-port {side.port} --router-mode kv --discovery-backend file"
    )
    worker = (
        f"-m dynamo.mocker --model-name {shape.model} --speedup-ratio {speedup:g} "
        f"--block-size {_BLOCK_SIZE} --discovery-backend file --model-path"
    )
    try:
        side.spawn([str(python), *frontend.split()], environment=environment)
        for _ in range(workers):
            side.spawn([str(python), *worker.split(), str(model)], environment=environment)
        side.wait_ready(shape)
        yield side
    finally:
        side.stop()
