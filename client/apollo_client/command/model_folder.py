"""What a user means by MODEL: a directory, or the hub id of a model that is cached here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from apollo_client.command.model_files import KINDS, has_tokenizer, read_object, what_is_missing
from apollo_client.command.vllm_options import told

# Where the training server puts config.json while shards are of two generations.
_ASIDE = ".config.json.apollo-aside"
_GGUF = ".gguf"
# With these vLLM gets weights, or a tokenizer, from elsewhere or not at all.
_OTHER_WEIGHTS = ("--load-format",)
_OTHER_TOKENIZER = ("--tokenizer", "--tokenizer-mode", "--skip-tokenizer-init")


def model_folder(model: Path) -> Path:
    """The directory itself, or the snapshot of a hub id in the cache; else the path as it is.

    Found as huggingface_hub finds it (constants.py, file_download.py), which the client does not
    depend on; nothing is downloaded.
    """
    if not _may_be_hub_id(model):
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


def _may_be_hub_id(model: Path) -> bool:
    # Unlike Path.exists, it raises for no name.
    there = os.path.exists(model)  # noqa: PTH110
    return not there and not model.is_absolute() and 1 <= len(model.parts) <= 2


def why_not_servable(model: Path, arguments: Sequence[str] = ()) -> str:
    """Why this cannot be served and trained, and what to do; empty where nothing is seen.

    Args:
        arguments: vLLM's.
    """
    try:
        if (model / _ASIDE).is_file():
            return (
                f"{model}: a sync was cut off, and its shards may be of two generations. Nothing "
                f"was started; settle it first: apollo-training-server recover {model}"
            )
        if model.suffix == _GGUF or _is_gguf_alone(model):
            return (
                f"{model} is GGUF, whose weights are quantised and cannot be trained. Nothing was "
                "started. transformers makes a directory of it that can be: "
                "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(NEW)"
            )
        if not (model / "config.json").is_file():
            return _no_directory(model)
        missing = _missing(model, arguments)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}. Nothing was started."
    return f"{model} {missing}. Nothing was started; {_completed(model)}." if missing else ""


def _missing(model: Path, arguments: Sequence[str]) -> str:
    """What is not there or not whole, to follow the model's name; empty if nothing."""
    try:
        read_object(model / "config.json")
        missing = "" if told(arguments, *_OTHER_WEIGHTS) else what_is_missing(model)
    except ValueError as error:
        return str(error)
    if not missing and not has_tokenizer(model) and not told(arguments, *_OTHER_TOKENIZER):
        return (
            "has no tokenizer (tokenizer.json, say), without which vLLM answers nonsense; "
            "--tokenizer FOLDER names one, and --skip-tokenizer-init goes without"
        )
    return missing


def _completed(model: Path) -> str:
    """How what is missing comes."""
    if model.parent.name == "snapshots" and model.parents[1].name.startswith("models--"):
        name = model.parents[1].name.removeprefix("models--").replace("--", "/")
        return f"what the hub has is fetched by: hf download {name}"
    return "copy the whole directory anew"


def _is_gguf_alone(model: Path) -> bool:
    endings = {path.suffix for path in model.iterdir()} if model.is_dir() else set()
    return _GGUF in endings and not endings & set(KINDS)


def _no_directory(model: Path) -> str:
    if not _may_be_hub_id(model):
        what = "it has no config.json" if model.is_dir() else "there is no such directory"
        return f"{model} is no model directory: {what}. Nothing was started."
    return (
        f"{model} is no directory here, and no model of that name is in the hub's cache "
        f"({_hub_cache()}). Nothing was started, and nothing is downloaded unasked. If the hub has "
        f"it, get it first: hf download {model}"
    )
