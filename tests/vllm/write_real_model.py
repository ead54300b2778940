"""Run as a process of its own: a GGUF file as a model directory of float32.

python -m tests.vllm.write_real_model FILE.gguf FOLDER

Needs the packages `gguf` and `accelerate`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# Of SmolLM2; transformers leaves out what the file says.
RMS_NORM_EPS = 1e-5


def main(file: Path, folder: Path) -> None:
    """Writes the folder: weights, config, tokenizer and chat template."""
    named = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**named)
    model = AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32)
    # What was read is no longer quantised, and would be saved as if it were.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.config.rms_norm_eps = RMS_NORM_EPS
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
