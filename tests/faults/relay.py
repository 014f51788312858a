"""Passes bytes from a listening address to another one: `relay.py tcp:PORT unix:PATH`, or the other way round."""

import asyncio
import sys
from contextlib import suppress
from pathlib import Path


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    kind, _, where = address.partition(":")
    if kind == "unix":
        return await asyncio.open_unix_connection(where)
    return await asyncio.open_connection("127.0.0.1", int(where))


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    with suppress(OSError):
        writer.close()


async def main(here: str, there: str) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await connect(there)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

    kind, _, where = here.partition(":")
    if kind == "unix":
        Path(where).unlink(missing_ok=True)
        server = await asyncio.start_unix_server(accept, where)
    else:
        server = await asyncio.start_server(accept, "127.0.0.1", int(where))
    async with server:
        await server.serve_forever()


asyncio.run(main(sys.argv[1], sys.argv[2]))
