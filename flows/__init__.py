"""Order, concurrency and parameters of the pipeline. The work is in `tasks`, the method in `research_rl`."""

from research_rl.terminal import guard_logs
from tasks import settings

settings.apply()  # before any import of prefect, which reads its settings then
guard_logs()  # what runs log holds text of data, models and servers
