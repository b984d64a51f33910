"""Training on a server: the runs that it takes part in, and their passes."""
