"""A training server beside an engine without vLLM, long enough for chats, for all recipes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server_process import ServerProcess, served

LENGTH = 128
# The bytes that no ASCII text has end an answer as well: what random weights say by themselves is
# then short, and the anchors that a run has them write cost little.
ENDS = [0, *range(97, 191)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One of its own model, of some 80,000 parameters, which recipes may change."""
    from transformers import Qwen3Config

    from examples.byte_model import write_model
    from tests import engine_double

    config = Qwen3Config(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ENDS,
        pad_token_id=0,
    )
    model: Path = write_model(tmp_path_factory.mktemp("recipes") / "model", config, seed=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_double, "MAX_MODEL_LEN", LENGTH)
        with served(model) as server:
            yield server
