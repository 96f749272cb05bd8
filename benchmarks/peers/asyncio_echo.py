"""asyncio_echo: a protocol for each connection, on asyncio's own loop or on uvloop's.

    asyncio_echo.py [--uvloop] PORT [BACKLOG]

Listens on 127.0.0.1; port 0 takes a free one. Prints "listening PORT" and serves until SIGTERM.
"""

from __future__ import annotations

import asyncio
import sys


class Echo(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    # What the client does not take is bounded: nothing is read while it waits.
    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()

    def eof_received(self) -> bool:
        """False: closed once everything has been written."""
        return False


async def serve(port: int, backlog: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Echo, "127.0.0.1", port, backlog=backlog)
    print("listening", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    arguments = [one for one in sys.argv[1:] if one != "--uvloop"]
    if not arguments:
        sys.exit("usage: asyncio_echo.py [--uvloop] PORT [BACKLOG]")
    serving = serve(int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else 128)
    if "--uvloop" not in sys.argv:
        asyncio.run(serving)
        return
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serving)


if __name__ == "__main__":
    main()
