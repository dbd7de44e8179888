"""Ways of answering a question: our protocol and its controls, retrieval without training, and the protocol of Search-R1."""

from research_rl.errors import ConfigError
from research_rl.evaluation.methods.base import LONGEST_PROMPT, Method, Played, Tools
from research_rl.evaluation.methods.ircot import IRCOT
from research_rl.evaluation.methods.own import CLOSED_BOOK, ORACLE, RESEARCH, SINGLE_SEARCH
from research_rl.evaluation.methods.retrieve import ITER_RETGEN, NAIVE, ZERO_SHOT
from research_rl.evaluation.methods.search_r1 import SEARCH_R1

__all__ = ["LONGEST_PROMPT", "METHODS", "Method", "Played", "Tools", "find"]

METHODS = {
    method.name: method for method in (RESEARCH, ZERO_SHOT, NAIVE, ITER_RETGEN, IRCOT, SEARCH_R1, CLOSED_BOOK, SINGLE_SEARCH, ORACLE)
}


def find(name: str) -> Method:
    """Return the method of this name. Raises ConfigError naming those that exist."""
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is not known; name one of {', '.join(METHODS)}")
    return METHODS[name]
