"""Parameters, operations and memory of networks."""
