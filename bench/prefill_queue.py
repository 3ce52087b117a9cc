"""What the prefill queue adds to a prefill: from Submit to `completed` of an empty task, between two processes.

    make bench-queue
    python bench/prefill_queue.py --tasks 500 --in-flight 1

The queue is a process of its own; this one is the submitters and one worker that completes at once what it leases. The
least that the calls on the way could take is measured beside it: as many empty unary calls (GetStats), one by one.

Most of it is threads waking each other, which costs what the machine makes it cost, most where a virtual CPU has to be
woken. `pinned`: each process keeps to one CPU, so that only its messages cross; as under a CPU manager that gives a
container its own. Nothing else may run there meanwhile.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import grpc
import uvloop
from reporting import print_report
from rich.console import Console
from rich.table import Table

from kvmesh import telemetry
from kvmesh.runtime.server import GrpcServer
from kvmesh.services.channels import CHANNEL_OPTIONS
from kvmesh.services.prefill_queue import PrefillQueue
from kvmesh.v1 import generation_pb2, prefill_queue_pb2, prefill_queue_pb2_grpc

_WORKER = "bench/prefill/0"
_LEASE_WAIT_S = 1
_CALLS_PER_TASK = 3
"""Submit, Lease's answer and Complete: what a task cannot do without."""


async def serve() -> None:
    """Serve a queue, say where, and end with stdin."""
    queue = PrefillQueue()
    server = GrpcServer()
    server.add(
        queue,
        prefill_queue_pb2.DESCRIPTOR.services_by_name["PrefillQueue"],
        prefill_queue_pb2_grpc.add_PrefillQueueServicer_to_server,
    )
    print(await server.start("127.0.0.1", 0, flag="--port"), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    queue.close()
    await server.drain_and_stop(1.0)


class Worker:
    """Completes at once what it leases, and leases on meanwhile, as prefill workers do."""

    def __init__(self, stub: prefill_queue_pb2_grpc.PrefillQueueStub) -> None:
        """Attach with `run`."""
        self._stub = stub
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, attached: asyncio.Event, *, at_once: int) -> None:
        """Work until cancelled."""
        attachment = self._stub.Attach(
            prefill_queue_pb2.AttachRequest(worker_id=_WORKER, epoch=1, models=["bench"]), timeout=3600
        )
        await attachment.read()
        attached.set()
        wanted = prefill_queue_pb2.LeaseRequest(worker_id=_WORKER, epoch=1, max_tasks=at_once)
        wanted.wait.FromSeconds(_LEASE_WAIT_S)
        while True:
            leased = await self._stub.Lease(wanted, timeout=60)
            for task in leased.tasks:
                work = asyncio.create_task(self._complete(task))
                self._running.add(work)
                work.add_done_callback(self._running.discard)
            await asyncio.sleep(0)  # what is done goes before what is wanted

    async def _complete(self, leased: prefill_queue_pb2.LeasedTask) -> None:
        key = prefill_queue_pb2.TaskKey(request_id=leased.task.request_id, attempt=leased.task.attempt)
        result = prefill_queue_pb2.TaskCompleted(handoff=generation_pb2.KvHandoff(worker_id=_WORKER))
        await self._stub.Complete(
            prefill_queue_pb2.CompleteRequest(key=key, lease_id=leased.lease_id, result=result), timeout=60
        )


async def measure(port: int, *, tasks: int, in_flight: int) -> dict[str, float]:
    """Return the figures of one run."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        stub = prefill_queue_pb2_grpc.PrefillQueueStub(channel)
        floor_ms = await _floor_ms(stub)
        attached = asyncio.Event()
        working = asyncio.create_task(Worker(stub).run(attached, at_once=in_flight))
        await asyncio.wait([working, asyncio.create_task(attached.wait())], return_when=asyncio.FIRST_COMPLETED)
        names = iter(range(tasks))
        taken: list[float] = []
        began = time.perf_counter()

        async def submit_all() -> None:
            taken.extend([await _one(stub, f"{began}-{name}") for name in names])

        await asyncio.gather(*(submit_all() for _ in range(in_flight)))
        wall_s = time.perf_counter() - began
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    taken.sort()
    return {
        "ms_p50": statistics.median(taken),
        "ms_p99": taken[int(len(taken) * 0.99)],
        "tasks_s": tasks / wall_s,
        "floor_ms": floor_ms,
    }


async def _one(stub: prefill_queue_pb2_grpc.PrefillQueueStub, name: str) -> float:
    task = prefill_queue_pb2.PrefillTask(request_id=name, attempt=1, model="bench")
    task.token_ids.token_ids.append(1)
    began = time.perf_counter()
    async for answer in stub.Submit(prefill_queue_pb2.SubmitRequest(task=task), timeout=60):
        if answer.HasField("completed"):
            return (time.perf_counter() - began) * 1e3
    raise SystemExit(f"the stream of {name} ended without `completed`")


async def _floor_ms(stub: prefill_queue_pb2_grpc.PrefillQueueStub, calls: int = 200) -> float:
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        await stub.GetStats(prefill_queue_pb2.GetStatsRequest(), timeout=10)
        taken.append((time.perf_counter() - began) * 1e3)
    return _CALLS_PER_TASK * statistics.median(taken)


def pin(cpus: tuple[int, ...]) -> None:
    """Keep this process to some CPUs; its threads too, also those that run already."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cpus)


def run_cases(in_flight: list[int], *, runs: int, tasks: int, pinned: bool) -> list[dict[str, Any]]:
    """Measure against a queue process of its own."""
    all_cpus = tuple(sorted(os.sched_getaffinity(0)))
    command = [sys.executable, __file__, "--serve", *(["--cpu", str(all_cpus[0])] if pinned else [])]
    if pinned:
        pin(all_cpus[1:2])
    reports = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        port = int(child.stdout.readline())
        uvloop.run(measure(port, tasks=100, in_flight=1))  # warm up
        for number in in_flight:
            figures = [uvloop.run(measure(port, tasks=tasks, in_flight=number)) for _ in range(runs)]
            ours = {name: round(statistics.median(run[name] for run in figures), 3) for name in figures[0]}
            reports.append({"params": {"in_flight": number, "tasks": tasks, "pinned": pinned}, "ours": ours})
        child.stdin.close()
    pin(all_cpus)
    return reports


def main() -> None:
    """Measure every case several times and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cpu", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=400, help="of each run")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 16], help="tasks submitted at once")
    given = parser.parse_args()
    if given.serve:
        if given.cpu is not None:
            pin((given.cpu,))
        telemetry.configure_logging(level="warning", log_format="json", stream=sys.stderr)
        uvloop.run(serve())
        return
    can_pin = hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1
    reports = [
        report
        for pinned in (False, *((True,) if can_pin else ()))
        for report in run_cases(given.in_flight, runs=given.runs, tasks=given.tasks, pinned=pinned)
    ]
    if not can_pin:
        print("no pinned cases: they take Linux and two CPUs", file=sys.stderr)
    title = "Submit to completed, one empty task; floor = three unary calls"
    table = Table("in flight", "CPUs", *reports[0]["ours"], title=title)
    for report in reports:
        params = report["params"]
        figures = (f"{value:,.2f}" for value in report["ours"].values())
        table.add_row(str(params["in_flight"]), "one each" if params["pinned"] else "any", *figures)
    Console(stderr=True, width=120).print(table)
    cases = [{**report, "peer": None, "ratio": None} for report in reports]
    print_report("queue", cases)


if __name__ == "__main__":
    main()
