"""The folder that vLLM loaded its weights from, where that is one of this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

log = logging.getLogger("vllm.apollo")


def model_directory(config: Any) -> str:
    """The folder of the weights, absolute; what vLLM was given where no folder is known.

    A hub's name stands for the snapshot that was loaded, which is asked for once, right after the
    load: a later download moves the name to another one.

    Args:
        config: vllm.config.VllmConfig.
    """
    name = str(config.model_config.model)
    if Path(name).is_dir():
        return str(Path(name).absolute())
    try:
        from huggingface_hub import snapshot_download

        return str(
            snapshot_download(
                name,
                revision=config.model_config.revision,
                cache_dir=config.load_config.download_dir,
                local_files_only=True,
            )
        )
    except Exception as error:
        log.warning("apollo: it is not known which folder %s was loaded from: %s", name, error)
        return name
