"""Evaluation of a policy on the held-out questions, through the episode loop of training."""
