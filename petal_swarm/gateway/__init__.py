"""A client of the swarm behind HTTP: an OpenAI-compatible API, a page, and a map of the swarm."""
