"""Supervision of the trainer: start, deadlines, checkpoints, records of each step, and the watch over its metrics."""
