"""Calls the basic worker, through the door of whatever serves it: python client.py."""

import asyncio

from pydantic import BaseModel

from kvmesh.sdk import Runtime, worker


class RequestType(BaseModel):
    """As the worker has it; a dict would do as well."""

    text: str


@worker()
async def client_worker(runtime: Runtime) -> None:
    """Print the words as they come."""
    client = await runtime.namespace("your_namespace").component("YourWorker").endpoint("generate").client()
    async for response in await client.generate(RequestType(text="Hello from a client")):
        print(response)  # noqa: T201  # it is what the program does


if __name__ == "__main__":
    asyncio.run(client_worker())
