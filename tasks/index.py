"""Tasks corpus, embed and index: from passages to a searchable index, with a card that says what it is."""

from tasks.artifacts import index_card
from tasks.stage import stage_task

__all__ = ["corpus", "embed", "index"]

corpus = stage_task("corpus")
embed = stage_task("embed")
index = stage_task("index", after=index_card)
