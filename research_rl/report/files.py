"""Names of the small files of a report that other tools read: DVC's metrics and plots. Knows names only."""

__all__ = ["CURVES", "HEADLINE"]

HEADLINE = "headline.json"
"""Before, after, difference and interval of F1 and EM, and the steps of training."""
CURVES = "curves.csv"
"""One row a training step: the step and the series of `research_rl.report.training`; a series that is absent there is empty."""
