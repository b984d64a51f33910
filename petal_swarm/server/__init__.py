"""A server: one process that hosts a span of blocks and answers sessions."""
