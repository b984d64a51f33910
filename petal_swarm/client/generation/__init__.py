"""Text from the swarm for programs with an event loop: many answers at once, each a stream."""
