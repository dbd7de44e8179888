"""research_rl: train a language model to reason with search by reinforcement learning (the ReSearch method)."""

__version__ = "0.1.0"
