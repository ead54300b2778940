"""A transformers model whose parameters are views of the live weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from apollo_trainer.weights.checkpoint_plan import CheckpointPlan, tied_parameters
from apollo_trainer.weights.manifest import refusal


def meta_model(directory: str) -> Any:
    """The text model of a directory without its weights, and without its towers.

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
            return _text_model(config, **chosen)
    except (OSError, ValueError, KeyError) as error:
        raise refusal(
            "MODEL_UNSUPPORTED",
            f"transformers cannot build the model that vLLM serves ({type(error).__name__}).",
        ) from error


def _text_model(config: Any, **chosen: str) -> Any:
    text = config.get_text_config()
    if text is config or type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM.from_config(text, **chosen)  # type: ignore[no-untyped-call]
    model = AutoModelForImageTextToText.from_config(config, **chosen)  # type: ignore[no-untyped-call]
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if head is None or not isinstance(decoder.config, type(text)):
        raise ValueError("what of the model is its text part cannot be told")
    _remove_towers(model, {*decoder.parameters(), *head.parameters()})
    return model


def _remove_towers(module: torch.nn.Module, kept: set[torch.nn.Parameter]) -> None:
    """A tower would have optimizer state and no gradient, and vLLM may not have loaded it."""
    for name, child in list(module.named_children()):
        parameters = set(child.parameters())
        if parameters and not parameters & kept:
            setattr(module, name, None)
        else:
            _remove_towers(child, kept)


def fill_with_views(model: Any, plan: CheckpointPlan, views: dict[str, torch.Tensor]) -> None:
    """Makes the views the parameters of a meta model, in place, without touching their values.

    Args:
        model: a transformers model on the meta device.
        views: one tensor for each root of the plan.

    Raises FailedPrecondition when a parameter or buffer is left without memory.
    """
    parameters = {name: torch.nn.Parameter(view) for name, view in views.items()}
    tied = tied_parameters(model)
    parameters |= {name: parameters[first] for name, first in tied.items() if first in parameters}
    for name, parameter in parameters.items():
        # A rank's part is of another shape than the parameter that it takes the place of.
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, parameter)
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
