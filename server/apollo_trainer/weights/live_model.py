"""A transformers model whose parameters are views of the live weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from apollo_trainer.weights.checkpoint_plan import CheckpointPlan
from apollo_trainer.weights.manifest import refusal


def meta_model(directory: str) -> Any:
    """The model of a directory without its weights.

    Raises FailedPrecondition when transformers has no class for it, or it is quantised.
    """
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        text = config.get_text_config()
        if any(getattr(each, "quantization_config", None) for each in (config, text)):
            raise refusal("QUANTIZED", "The model is quantised; train an unquantised one.")
        # torch's own attention has no soft cap, and would leave it out in silence.
        capped = getattr(text, "attn_logit_softcapping", None)
        chosen = {"attn_implementation": "eager"} if capped else {}
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **chosen)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError) as error:
        raise refusal(
            "MODEL_UNSUPPORTED",
            f"transformers cannot build the model that vLLM serves ({type(error).__name__}).",
        ) from error


def fill_with_views(model: Any, plan: CheckpointPlan, views: dict[str, torch.Tensor]) -> None:
    """Makes the views the parameters of a meta model, in place, without touching their values.

    Args:
        model: a transformers model on the meta device.
        views: one tensor for each root of the plan.

    Raises FailedPrecondition when a parameter or buffer is left without memory.
    """
    parameters = {name: torch.nn.Parameter(view) for name, view in views.items()}
    parameters |= {name: parameters[first] for name, first in plan.tied.items()}
    model.load_state_dict(parameters, strict=False, assign=True)
    model.tie_weights()
    _give_buffers_memory(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise refusal("MODEL_INCOMPLETE", f"Nothing fills {name} of the transformers model.")
    # Dropout would train another model than the one that vLLM serves.
    model.eval()


def _give_buffers_memory(model: Any) -> None:
    """Computes buffers that no checkpoint holds, such as rotary frequencies."""
    device = next(model.parameters()).device
    for parameter in model.parameters():
        # initialize_weights() would overwrite the live weights of any parameter without the mark.
        parameter._is_hf_initialized = True
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, attribute = name.rpartition(".")
            memory = torch.zeros_like(buffer, device=device)
            model.get_submodule(owner)._buffers[attribute] = memory
    model.initialize_weights()
