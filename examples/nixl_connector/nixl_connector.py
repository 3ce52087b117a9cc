"""Two engines, each a process, that move KV blocks with the connector: see README.md beside this file."""

# ruff: noqa: T201  # it is made to be watched

import multiprocessing
from multiprocessing.connection import Connection

import numpy as np

from kvmesh.transports.connector import NixlConnector

LAYERS, BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM = 4, 32, 16, 8, 64
TIMEOUT_S = 20.0


def main() -> None:
    """Be the decode engine, and start the prefill engine."""
    caches = [np.zeros((BLOCKS, BLOCK_SIZE, HEADS, HEAD_DIM), dtype=np.float32) for _ in range(LAYERS)]
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    prefill_process = spawning.Process(target=prefill, args=(theirs,))
    prefill_process.start()

    with NixlConnector("decode-0") as connector:
        connector.register_kv_caches(caches)
        ours.send(connector.get_agent_metadata())

        sender, notification = connector.wait_for_notification(timeout_s=TIMEOUT_S)
        print(f"{sender} wrote: {notification.decode()}")
        print(f"block 12 holds {caches[0][12, 0, 0, 0]:g}, block 16 holds {caches[-1][16, 0, 0, 0]:g}")

        connector.add_remote_agent("prefill-0", ours.recv())
        transfer = connector.read_blocks("prefill-0", [20, 21], [5, 6], b"blocks 5 and 6 were read")
        connector.wait(transfer, timeout_s=TIMEOUT_S)
        print(f"read {transfer.size_bytes} bytes: block 20 holds {caches[0][20, 0, 0, 0]:g}")
        print(ours.recv())
    prefill_process.join(TIMEOUT_S)


def prefill(decode: Connection) -> None:
    """Be the prefill engine: its block b holds the number b in layer 0, 100 + b in layer 1, and so on."""
    numbers = np.arange(BLOCKS, dtype=np.float32)[:, np.newaxis, np.newaxis, np.newaxis]
    caches = [np.tile(numbers + 100 * layer, (1, BLOCK_SIZE, HEADS, HEAD_DIM)) for layer in range(LAYERS)]

    with NixlConnector("prefill-0") as connector:
        connector.register_kv_caches(caches)
        connector.add_remote_agent("decode-0", decode.recv())
        transfer = connector.write_blocks("decode-0", [1, 3], [12, 16], b"request 7")
        connector.wait(transfer, timeout_s=TIMEOUT_S)

        decode.send(connector.get_agent_metadata())
        reader, notification = connector.wait_for_notification(timeout_s=TIMEOUT_S)
        decode.send(f"prefill-0 heard from {reader}: {notification.decode()}")


if __name__ == "__main__":
    main()
