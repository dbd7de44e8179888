"""What Prefect's parameter form offers to choose from: the profiles and the stages. Knows names only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from research_rl.config import profiles
from research_rl.pipeline.stages import STAGES

__all__ = ["Profile", "StageName"]

if TYPE_CHECKING:
    Profile = str
    StageName = str
else:
    # The names are read when a flow is loaded, so that a profile added to configs/ is offered without a change here.
    Profile = Literal[tuple(profiles())]
    StageName = Literal[tuple(STAGES)]
