"""What Dask workers on this machine leave out of their log.

When a local cluster closes, a worker's last heartbeat may meet a scheduler that has gone: its
error and traceback, at the end of a run that went well, would only frighten. Heartbeats that fail
earlier are left out too; a worker that has lost its scheduler says so when its connection breaks.
"""

import logging
from typing import Any

from distributed import WorkerPlugin

HEARTBEAT_FAILED = "Failed to communicate with scheduler during heartbeat"


class QuietHeartbeat(WorkerPlugin):
    """Set up in every worker, also in one that replaces another."""

    def setup(self, worker: Any) -> None:
        """Filter what the process of this worker logs."""
        logging.getLogger("distributed.worker").addFilter(is_worth_saying)


def is_worth_saying(record: logging.LogRecord) -> bool:
    """Whether a record of Dask's workers is anything but a heartbeat that found no scheduler."""
    return not record.getMessage().startswith(HEARTBEAT_FAILED)
