"""What all tests share: shapes are checked at run time, real data where it is there."""

import os
from pathlib import Path

from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "2")
install_import_hook(["model", "pipeline", "conditioning", "jobs"], "beartype.beartype")

import pytest  # noqa: E402

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides and aerial images beside the repository; the test is skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real data is not on this machine (../shared/data)")
    return SHARED_DATA
