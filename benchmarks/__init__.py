"""Duels: ours against a peer, run alternately in one process tree. Ratios and CPU-seconds; absolute times of shared machines lie."""
