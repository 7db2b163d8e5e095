"""The loop and what hangs on it: optimizer, schedule, checkpoints, logs, signals. Knows no loss by name."""
