"""MLflow off the critical path: a journal on disk, and a process of its own that sends it. Knows no stage's work."""
