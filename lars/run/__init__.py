"""A run from its start to its end: folder, agreement of all processes, checkpoints, signals, watchdog, logs."""
