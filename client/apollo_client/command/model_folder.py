"""What a user means by MODEL: a directory, or the hub id of a model that is cached here."""

from __future__ import annotations

import os
from pathlib import Path

# Where the training server puts config.json while shards are of two generations.
_ASIDE = ".config.json.apollo-aside"
_GGUF = ".gguf"
# What vLLM loads where it is there, whatever lies beside it.
_LOADED = (".safetensors", ".bin", ".pt")


def model_folder(model: Path) -> Path:
    """The directory itself, or the snapshot of a hub id in the cache; else the path as it is.

    Found as huggingface_hub finds it (constants.py, file_download.py), which the client does not
    depend on; nothing is downloaded.
    """
    if model.exists() or model.is_absolute() or len(model.parts) != 2:
        return model
    repository = _hub_cache() / f"models--{'--'.join(model.parts)}"
    try:
        revision = (repository / "refs" / "main").read_text().strip()
    except OSError:
        return model
    snapshot = repository / "snapshots" / revision
    return snapshot if snapshot.is_dir() else model


def _hub_cache() -> Path:
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    home = os.environ.get("HF_HOME") or cache_home / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def why_not_servable(model: Path) -> str:
    """Why this cannot be served and trained, and what to do; empty where nothing is seen."""
    if (model / _ASIDE).is_file():
        return (
            f"{model}: a sync was cut off, and its shards may be of two generations. Nothing was "
            f"started; settle it first: apollo-training-server recover {model}"
        )
    if model.suffix == _GGUF or _is_gguf_alone(model):
        return (
            f"{model} is GGUF, whose weights are quantised and cannot be trained. Nothing was "
            "started. transformers makes a directory of it that can be: "
            "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(NEW)"
        )
    if not (model / "config.json").is_file():
        return f"{model} is no model directory: it has no config.json.{_not_cached(model)}"
    return ""


def _is_gguf_alone(model: Path) -> bool:
    endings = {path.suffix for path in model.iterdir()} if model.is_dir() else set()
    return _GGUF in endings and not endings & set(_LOADED)


def _not_cached(model: Path) -> str:
    if model.exists() or model.is_absolute() or len(model.parts) != 2:
        return ""
    return (
        f" If it is a model of the hub, it is not in the cache ({_hub_cache()}). Download it "
        f"first: hf download {model}"
    )
