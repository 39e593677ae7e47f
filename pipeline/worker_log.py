"""What Dask workers on this machine leave out of their log. Dask imports this module in each of
them (a preload of `cluster`'s local cluster).

When a local cluster closes, a worker's last heartbeat may meet a scheduler that has gone: its
error and traceback, at the end of a run that went well, would only frighten.
"""

import logging
from typing import Any

LAST_HEARTBEAT = "Failed to communicate with scheduler during heartbeat"


def dask_setup(worker: Any) -> None:
    """Called by Dask in every worker before its first heartbeat."""
    logging.getLogger("distributed.worker").addFilter(is_worth_saying)


def is_worth_saying(record: logging.LogRecord) -> bool:
    """Whether a record of Dask's workers is anything but a heartbeat that found no scheduler."""
    return not record.getMessage().startswith(LAST_HEARTBEAT)
