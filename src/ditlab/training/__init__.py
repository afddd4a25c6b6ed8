"""The training loop and what it stands on: moving average, checkpoints, several processes."""
