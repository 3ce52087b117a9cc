"""The load: prompts made from a seed, and the client in C that both sides are driven with."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.model_folder import TEMPLATE_TOKENS, WORDS

_SOURCE = Path(__file__).with_name("sse_load.c")
_CLIENT_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Shape:
    """What one request is."""

    model: str
    prompt_tokens: int = 512
    output_tokens: int = 64
    shared_tokens: int = 256
    """The beginning that all prompts of one group share."""
    groups: int = 8

    def body(self, seed: int) -> dict[str, Any]:
        """Return the body of a chat completion, always the same for a seed."""
        group, own = random.Random(seed % self.groups), random.Random(f"own {seed}")
        words = group.choices(WORDS, k=self.shared_tokens)
        words += own.choices(WORDS, k=self.prompt_tokens - TEMPLATE_TOKENS - self.shared_tokens)
        return {
            "model": self.model,
            "stream": True,
            "max_tokens": self.output_tokens,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": " ".join(words)}],
        }

    def rest_body(self, seed: int) -> dict[str, Any]:
        """Return the same request as REST has it."""
        asked = self.body(seed)
        return {
            "model": self.model,
            "prompt": {"messages": {"messages": asked["messages"]}},
            "sampling": {"max_tokens": self.output_tokens, "ignore_eos": True},
        }


class LoadClient:
    """The compiled client."""

    def __init__(self, work: Path, *, acknowledges_at_once: bool) -> None:
        """Compile it into `work`; `acknowledges_at_once` hides a server that leaves Nagle's algorithm on."""
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            sys.exit("this bench drives both sides with a client in C and finds no C compiler (cc)")
        self._program = work / "sse_load"
        self._work = work
        self._environment = {**os.environ, "SSE_QUICKACK": str(int(acknowledges_at_once))}
        subprocess.run([compiler, "-O2", "-o", str(self._program), str(_SOURCE)], check=True)

    def drive(
        self, port: int, shape: Shape, *, concurrency: int, requests: int, seed: int, rest: bool = False
    ) -> dict[str, float]:
        """Send `requests` that no other seed has, `concurrency` at a time; return what the client counted.

        They go to the OpenAI API, or to the mesh's own REST.

        Raises: SystemExit if a request failed.
        """
        bodies = self._work / "bodies"
        first = seed * 1_000_000
        body = shape.rest_body if rest else shape.body
        lines = (json.dumps(body(first + index), separators=(",", ":")) for index in range(requests))
        bodies.write_text("\n".join(lines) + "\n", encoding="utf-8")
        ran = subprocess.run(
            [str(self._program), str(port), str(bodies), str(concurrency), str(requests), *(["rest"] if rest else [])],
            env=self._environment,
            stdout=subprocess.PIPE,
            check=True,
            text=True,
            timeout=_CLIENT_TIMEOUT_S,
        )
        counted: dict[str, float] = json.loads(ran.stdout)
        if counted["failed"]:
            sys.exit(f"{counted['failed']} of {requests} requests failed on port {port}")
        return counted
