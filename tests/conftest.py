"""What all tests share: shapes are checked at run time, draws are fixed, real data where it is."""

import os
from collections.abc import Iterator
from pathlib import Path

from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two pytest workers share two cores
install_import_hook(["model", "pipeline", "conditioning", "jobs", "slurm"], "beartype.beartype")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from processes import none_left_running  # noqa: E402

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real slides and aerial images beside the repository; skips, loudly, without them."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real data is not on this machine (../shared/data)")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _none_left_running() -> Iterator[None]:
    with none_left_running():
        yield


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A small phantom, ingested, embedded and packed; made once, not to be changed."""
    from chain import build

    return build(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="session")
def point_packs(chain, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Packs of the small phantom by every design of points, by name; made once."""
    from chain import pack_points

    return pack_points(chain, tmp_path_factory.mktemp("points"))
