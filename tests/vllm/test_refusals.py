"""Ways to start vLLM under which weights are not shared are refused by the flag's name."""

from __future__ import annotations

import json

import pytest
from transformers import DeepseekV2Config

from examples.byte_model import write_model
from tests import programs

pytestmark = pytest.mark.vllm
LATENT = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
}
REFUSED = {
    "lora": ("LORA_ENABLED", "--enable-lora"),
    "pipeline parallel": ("TENSOR_PARALLEL_UNSUPPORTED", "--pipeline-parallel-size"),
    "drafts of a model": ("SPECULATIVE_DRAFT", "--speculative-config"),
    "offload": ("WEIGHTS_OFFLOADED", "--cpu-offload-gb"),
    "quantised": ("QUANTIZED", "--quantization"),
    "gguf": ("QUANTIZED", "GGUF"),
    "sleep mode": ("SLEEP_MODE", "--enable-sleep-mode"),
    "moving experts": ("EXPERTS_MOVED", "--enable-eplb"),
    "expandable segments": ("EXPANDABLE_SEGMENTS", "PYTORCH_CUDA_ALLOC_CONF"),
}
TAKEN = (
    "plain",
    "tensor parallel",
    "ngram drafts",
    "latent attention",
    "a GPU",
    "expandable segments on a CPU",
)


@pytest.fixture(scope="module")
def found(tiny_model, tmp_path_factory):
    latent = write_model(tmp_path_factory.mktemp("mla"), DeepseekV2Config(**LATENT), seed=5)
    offline = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    printed = programs.run_beside_vllm("tests.vllm.read_configs", tiny_model, latent, **offline)
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("way", REFUSED)
def test_it_is_refused_with_the_flag_that_brought_it_about(found, way):
    reason, flag = REFUSED[way]
    assert found["verdicts"][way][0] == reason
    assert flag in found["verdicts"][way][1]


@pytest.mark.parametrize("way", TAKEN)
def test_it_is_taken(found, way):
    assert found["verdicts"][way] == []


def test_only_experts_whose_weights_stay_as_loaded_are_taken(found):
    experts = found["experts"]
    assert {"TRITON", "CPU"} <= {name for name, taken in experts.items() if taken}
    assert {name for name, taken in experts.items() if taken} <= {"TRITON", "BATCHED_TRITON", "CPU"}
    assert any("FLASHINFER" in name for name, taken in experts.items() if not taken)
