"""Tasks baseline, evaluate and report: the policy before and after training on the same held-out questions."""

from tasks.artifacts import build_report, evaluation_table, report_page
from tasks.stage import stage_task

__all__ = ["baseline", "evaluate", "report"]

baseline = stage_task("baseline", after=evaluation_table, heavy=True)
evaluate = stage_task("evaluate", after=evaluation_table, heavy=True)
report = stage_task("report", build=build_report, after=report_page)
