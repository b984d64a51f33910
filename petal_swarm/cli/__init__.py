"""The programs: `run_server` and `petal-swarm`. The only layer that prints and configures logging."""
