"""Training through the swarm: forward and backward of packed rows along open chains of servers ("lanes")."""
