"""A TCP proxy on loopback that a test can cut or stall, as a network does."""

import asyncio


class TcpProxy:
    """Forwards to one port of 127.0.0.1, from `start` to `aclose`."""

    def __init__(self, target_port: int) -> None:
        """Forward to `target_port`."""
        self.port = 0
        """Where it listens, once started."""
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._is_cut = False

    @property
    def address(self) -> str:
        """HOST:PORT of the proxy."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Break every connection and close every new one at once, until `restore`."""
        self._is_cut = True
        await self.break_connections()

    def stall(self) -> None:
        """Keep every connection open and let nothing through, until `restore`."""
        self._flowing.clear()

    def restore(self) -> None:
        """Forward again."""
        self._is_cut = False
        self._flowing.set()

    async def aclose(self) -> None:
        """Stop listening and break every connection. Idempotent."""
        if self._server is not None:
            self._server.close()
        await self.break_connections()

    async def break_connections(self) -> None:
        """Break every connection, and take new ones."""
        connections = tuple(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.get_running_loop().create_task(self._forward(reader, writer), name="tcp-proxy")
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hold one connection until either side ends it."""
        ends = [writer]
        try:
            if self._is_cut:
                return
            to_target = await asyncio.open_connection("127.0.0.1", self._target_port)
            ends.append(to_target[1])
            pumps = [
                asyncio.create_task(self._pump(reader, to_target[1])),
                asyncio.create_task(self._pump(to_target[0], writer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            return  # the target refuses: so does the proxy
        finally:
            for end in ends:
                end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
