"""A peer behind the Go daemon, for the tests of the other transport: hivemind's `P2P` and nothing of ours.

Prints its address and serves until its stdin is closed. Run by test_libp2p_transport.py.
"""

import asyncio
import hashlib
import sys
from pathlib import Path

from hivemind.p2p import P2P, PeerID
from hivemind.utils.multiaddr import Multiaddr

CHUNK_BYTES = 1 << 18


class Peer:
    def __init__(self, p2p):
        self.p2p = p2p
        self.released = asyncio.Event()
        self.heard = asyncio.Queue()

    async def echo(self, info, reader, writer):
        """Send everything back; end when the caller ends."""
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def bye(self, info, reader, writer):
        """End first. The daemon knows no half-closed streams: this ends both directions."""
        writer.write(b"bye")
        writer.close()

    async def hear(self, info, reader, writer):
        """Hear the caller out; `told` says what it was."""
        await self._listen(reader, writer)

    async def stall(self, info, reader, writer):
        """Like `hear`, but read nothing before `release` is called."""
        await self.released.wait()
        await self._listen(reader, writer)

    async def release(self, info, reader, writer):
        await reader.readexactly(1)
        self.released.set()
        writer.close()

    async def told(self, info, reader, writer):
        """The digest of what the last `hear` or `stall` heard."""
        await reader.readexactly(1)
        writer.write(await self.heard.get())
        writer.close()

    async def call(self, info, reader, writer):
        """Read an address, or an empty line for the caller; ask `/back/1` there and pass the answer on."""
        address = (await reader.readline()).decode().strip()
        peer_id = info.peer_id
        if address:
            base, _, name = address.rpartition("/p2p/")
            peer_id = PeerID.from_base58(name)
            await self.p2p._client.control.connect(peer_id, [Multiaddr(base)])
        _, back_reader, back_writer = await self.p2p.call_binary_stream_handler(peer_id, "/back/1")
        back_writer.write(b"who is there?\n")
        writer.write(await back_reader.read())
        back_writer.close()
        writer.close()

    async def _listen(self, reader, writer):
        digest = hashlib.sha256()
        while data := await reader.read(CHUNK_BYTES):
            digest.update(data)
        self.heard.put_nowait(digest.digest())
        writer.close()


async def main(identity_path: Path) -> None:
    p2p = await P2P.create(identity_path=str(identity_path), check_if_identity_free=False)
    peer = Peer(p2p)
    for name in ("echo", "bye", "hear", "stall", "release", "told", "call"):
        await p2p.add_binary_stream_handler(f"/{name}/1", getattr(peer, name))
    print((await p2p.get_visible_maddrs())[0], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await p2p.shutdown()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
