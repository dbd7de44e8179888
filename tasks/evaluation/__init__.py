"""Evaluation as Prefect tasks: before and after training, by a matrix of methods, against the champion, and at night."""
