"""The engine of a server: KV cache, scheduler and compute thread. No network, no asyncio."""
