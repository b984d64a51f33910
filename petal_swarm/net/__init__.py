"""Transports: how bytes travel between peers. Payloads are bytes; nothing here knows tensors or messages."""
