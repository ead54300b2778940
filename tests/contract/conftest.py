"""A folder whose name is short enough for a unix socket."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Private (0700), as mkdtemp makes it; removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="apollo-"))
    yield folder
    shutil.rmtree(folder)
