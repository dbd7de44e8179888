"""Order, concurrency and parameters of the pipeline. The work is in `tasks`, the method in `research_rl`."""

from tasks import settings

settings.apply()  # before any import of prefect, which reads its settings then
