"""Great Expectations' renderer of validation results, with every value of the data escaped. Knows results; decides nothing.

Great Expectations 1.24 escapes a value only where its page gives it a style of its own: the values and rows that break an expectation
stand in the page as they are, so a passage with a <script> in it would run.
"""

from __future__ import annotations

from copy import deepcopy
from html import escape
from typing import Any

from great_expectations.core import ExpectationSuiteValidationResult
from great_expectations.render.renderer import ValidationResultsPageRenderer

__all__ = ["EscapedResultsRenderer"]


class EscapedResultsRenderer(ValidationResultsPageRenderer):
    """Named in the site's configuration, so that Great Expectations makes it."""

    def render(self, validation_results: ExpectationSuiteValidationResult, suite_parameters: Any = None) -> Any:
        """Return the page's content; the stored results stay as they are."""
        results = deepcopy(validation_results)
        for outcome in results.results:
            outcome.result = _escaped(outcome.result)
            outcome.exception_info = _escaped(outcome.exception_info)
        return super().render(results, suite_parameters)


def _escaped(tree: Any) -> Any:
    if isinstance(tree, str):
        return escape(tree)
    if isinstance(tree, dict):
        return {_escaped(key): _escaped(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_escaped(item) for item in tree]
    return tree
