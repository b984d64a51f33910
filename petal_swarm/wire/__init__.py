"""The protocol without I/O: frames, messages, state tables and the tensor codec.

Nothing here may know sockets, asyncio or the clock. `docs/protocol.md` is the normative text.
"""
