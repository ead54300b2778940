"""What a step needs, in words: lengths that are told of, and lengths that are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from apollo_trainer.training.memory import StepMemory
from apollo_trainer.training.needs import StepShape, lengths_of, told
from apollo_trainer.training.options import StateShape
from apollo_trainer.training.twin import twin_of


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("1800+200", StepShape(1800, 200)),
        (" 1800 + 200 ", StepShape(1800, 200)),
        ("32x64+65", StepShape(64, 65, 32)),
    ],
)
def test_a_length_is_read(text: str, shape: StepShape) -> None:
    assert StepShape.parse(text) == shape


@pytest.mark.parametrize("text", ["", "17", "1+", "0+5", "5+0", "0x5+5", "-1+5", "1.5+2", "5+5x2"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no length of a step"):
        StepShape.parse(text)


@pytest.mark.parametrize("longest", [2, 3, 64, 1024, 1025, 40960])
def test_the_longest_sample_is_told_of_and_none_is_longer(longest: int) -> None:
    shapes = lengths_of(longest)
    assert max(shape.context + shape.continuation for shape in shapes) == longest
    assert all(shape.context and shape.continuation for shape in shapes)


def test_samples_have_the_length_and_contexts_of_their_own() -> None:
    samples = StepShape(5, 3, samples=4).of_samples()
    assert {(len(s.context_ids), len(s.continuation_ids)) for s in samples} == {(5, 3)}
    assert len({sample.context_ids for sample in samples}) == 4


def test_the_sentences_say_what_the_steps_need_and_what_is_free(
    make_model: Callable[[str], Any],
) -> None:
    memory = StepMemory(twin_of(make_model("qwen3").bfloat16()), StateShape(8), 1024)
    needs = [f"{memory.step_bytes(s.of_samples()) / 1e9:.1f}" for s in lengths_of(4096)]
    assert told(memory, 4096, 81_300_000_000) == [
        f"A step of 768 + 256 tokens needs {needs[0]} GB of the device.",
        f"A step of 3584 + 512 tokens needs {needs[1]} GB of the device.",
        "81.3 GB are free.",
    ]
