"""Processes that end with their owner: starting, watching and ending them."""
