"""Server-sent events: one `data:` event per token, one write for all that are ready."""

CONTENT_TYPE = b"text/event-stream; charset=utf-8"
DONE = b"data: [DONE]\n\n"
"""What ends a good stream of the OpenAI API."""


def event(data: bytes) -> bytes:
    """Return one event; `data` is JSON, which never holds a line break."""
    return b"data: " + data + b"\n\n"
