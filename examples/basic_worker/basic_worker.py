"""A component that answers a text word by word. Serve it: kvmesh serve basic_worker:YourWorker."""

from collections.abc import AsyncIterator

from pydantic import BaseModel, Field

from kvmesh.sdk import endpoint, service


class RequestType(BaseModel):
    """What to say."""

    text: str = Field(description="The words.")


class ResponseType(BaseModel):
    """One word of it."""

    text: str


@service(namespace="your_namespace")
class YourWorker:
    """Says what it is told."""

    @endpoint()
    async def generate(self, request: RequestType) -> AsyncIterator[ResponseType]:
        """Stream the words of the text."""
        for word in request.text.split():
            yield ResponseType(text=word)

    @endpoint()
    async def shout(self, request: RequestType) -> ResponseType:
        """Return the text in upper case, at once."""
        return ResponseType(text=request.text.upper())
