"""What `petal-swarm tune` is made of; none of it knows a swarm, only a model with a loss."""
