"""Children of a process that speaks gRPC all the while."""

import json
import os
import subprocess
import sys

CHILDREN = 100
"""A few of these die where gRPC's handlers run."""
PROGRAM = f"""
import asyncio, collections, json
from kvmesh.cli.main import set_up_grpc
set_up_grpc()
import grpc, uvloop
from asyncio.subprocess import DEVNULL, PIPE
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

async def main():
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{{port}}") as channel:
        async def speak():
            while True:
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        speaking = [asyncio.ensure_future(speak()) for _ in range(4)]
        ends = collections.Counter()
        for _ in range({CHILDREN}):
            child = await asyncio.create_subprocess_exec(
                "true", stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, start_new_session=True, preexec_fn=lambda: None
            )
            ends[await child.wait()] += 1
        for one in speaking:
            one.cancel()
        await asyncio.gather(*speaking, return_exceptions=True)
    await server.stop(None)
    print(json.dumps(ends))

uvloop.run(main())
"""


def test_no_child_dies_between_fork_and_exec_of_grpcs_own_handlers() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}

    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, check=True, timeout=60
    )

    assert json.loads(ran.stdout) == {"0": CHILDREN}
