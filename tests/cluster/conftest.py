from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm_cluster import Cluster, missing_programs, running_cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A real Slurm of two nodes with four processors each, for the whole session."""
    if missing := missing_programs():
        pytest.skip(f"no Slurm here ({', '.join(missing)} not found): scripts/slurm_local.sh install")
    with running_cluster() as cluster:
        yield cluster
