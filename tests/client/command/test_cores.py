"""Which cores vLLM's workers and the training server get."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_client.command import cores
from apollo_client.command.vllm_options import workers


@given(st.integers(2, 24), st.integers(1, 8))
def test_each_worker_has_a_core_and_the_trainer_has_half(count: int, ranks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cores, "engine_on_cpu", lambda: True)
        patch.setattr("os.sched_getaffinity", lambda pid: set(range(count)))
        found = cores.split_cores(ranks)
    assert found
    bound = [set(map(int, part.split(","))) for part in found.bound(ranks).split("|")]
    assert len(bound) == ranks and set().union(*bound) == set(found.engine)
    if ranks <= count:
        assert sum(map(len, bound)) == len(found.engine)
    assert len(found.trainer) == count // 2
    if ranks <= count - count // 2:
        assert not set(found.engine) & set(found.trainer)


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ([], 1),
        (["--tensor-parallel-size", "2"], 2),
        (["--tensor_parallel_size=4"], 4),
        (["--max-model-len", "64", "-tp", "2"], 2),
    ],
)
def test_how_many_workers_vllm_is_told(said: list[str], count: int) -> None:
    assert workers(said) == count


def test_how_many_workers_its_file_says(tmp_path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("model: x\ntensor_parallel_size: 2\n")
    assert workers(["--config", str(file)]) == 2
