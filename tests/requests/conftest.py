"""The byte tokenizer."""

from __future__ import annotations

from typing import Any

import pytest

from examples.byte_model import byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return byte_tokenizer()
