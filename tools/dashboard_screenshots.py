"""Take the screenshots of docs/dashboard.md: `kvmesh up` with `kvmesh replay` running, at two widths, light and dark.

    python tools/dashboard_screenshots.py [TRACE] [--folder docs/images] [--seconds 125] [--engine simulated ...]

Without a trace, conversations of its own are replayed, which suit the model that the mesh serves by itself. Needs
Chromium (`make install-chromium`) and, for files of a quarter of the size, Pillow (part of `make install-dev`).
"""

import argparse
import asyncio
import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kvmesh.testing.chromium import running_chromium
from kvmesh.testing.mesh_process import PROGRAM, MeshProcess, clean_environment

SIZES = {1280: 900, 390: 844}
MAX_BYTES = 250_000
COLOURS = 240
SETTLE_S = 2.5
PROMPT = "Tell me a joke"


def main() -> None:
    """Take them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "trace", nargs="?", type=Path, help="in Mooncake's format; without one, conversations of its own"
    )
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    parser.add_argument("--seconds", type=float, default=125.0, help="how long the page is open before")
    parser.add_argument("--speed", type=float, default=1.0, help="divides the times between the trace's requests")
    options, up_flags = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    flags = up_flags or ["--decode", "3", "--prefill", "2"]
    with TemporaryDirectory() as folder, MeshProcess(*flags) as mesh:
        trace = options.trace or write_conversations(Path(folder) / "conversations.jsonl", seconds=options.seconds + 60)
        with replaying(trace, target=mesh.grpc_address, speed=options.speed):
            asyncio.run(take(mesh.http_url + "/", options.folder, watch_s=options.seconds))
        mesh.stop()


def write_conversations(path: Path, *, seconds: float, seed: int = 7) -> Path:
    """Write a trace of short conversations, each turn of which begins with all that was said before."""
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    for conversation in range(int(seconds * 0.35)):
        at_s, length = rng.uniform(0, seconds), 0
        for _ in range(rng.randint(3, 7)):
            length = min(length + rng.randint(12, 90), 500)
            rows.append(
                {
                    "timestamp": round(at_s * 1000),
                    "input_length": length,
                    "output_length": rng.randint(8, 40),
                    "hash_ids": [conversation + 1],
                }
            )
            at_s += rng.uniform(0.8, 4.0)
    rows.sort(key=lambda row: row["timestamp"])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextmanager
def replaying(trace: Path, *, target: str, speed: float) -> Iterator[None]:
    """Replay a trace for the block."""
    command = [PROGRAM, "replay", str(trace), "--target", target, "--speed", str(speed)]
    process = subprocess.Popen(command, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=sys.stderr)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


async def take(url: str, folder: Path, *, watch_s: float) -> None:
    """Look at the page for `watch_s`, send a prompt, and keep what it then shows in every size and theme."""
    async with running_chromium() as chromium:
        page = await chromium.open(url, width=1280, height=SIZES[1280])
        await asyncio.sleep(watch_s)
        await page.evaluate(f"document.getElementById('prompt').value = {json.dumps(PROMPT)}")
        await page.evaluate("document.getElementById('prompt-form').requestSubmit()")
        await page.wait_for("document.getElementById('prompt-status').textContent.startsWith('Done')")
        await page.evaluate("document.getElementById('hold').click()")
        await page.evaluate("document.querySelector('.decisions details').open = true")
        for width, height in SIZES.items():
            await page.resize(width, height)
            for theme in ("light", "dark"):
                await page.prefer_dark(theme == "dark")
                await asyncio.sleep(SETTLE_S)
                keep(in_few_colours(await page.screenshot()), folder / f"dashboard-{width}-{theme}.png")


def keep(picture: bytes, path: Path) -> None:
    """Write one screenshot. Raises: SystemExit where it is too large for a repository."""
    if len(picture) > MAX_BYTES:
        raise SystemExit(f"{path} would be {len(picture):,} bytes, above {MAX_BYTES:,}")
    path.write_bytes(picture)
    sys.stderr.write(f"{path}: {len(picture):,} bytes\n")


def in_few_colours(picture: bytes) -> bytes:
    """Return the same picture with a palette, or as it is without Pillow."""
    try:
        from PIL import Image  # noqa: PLC0415  # nothing of the mesh needs it
    except ImportError:
        return picture
    made = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("P", palette=Image.Palette.ADAPTIVE, colors=COLOURS).save(
        made, "PNG", optimize=True
    )
    return made.getvalue()


if __name__ == "__main__":
    main()
