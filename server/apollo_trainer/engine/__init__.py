"""One vLLM engine: found, attached, watched, paused, and given up."""

from apollo_trainer.engine.coherence import coherence_of, engine_is_gone, version_changed
from apollo_trainer.engine.engine_watch import EngineWatch, no_engine
from apollo_trainer.engine.model_checkpoints import undo_of
from apollo_trainer.engine.open_session import prepare
from apollo_trainer.engine.owner import ModelOwner
from apollo_trainer.engine.pause import EnginePause
from apollo_trainer.engine.server_info import ServerInfo
from apollo_trainer.engine.session import Session, new_optimizer
from apollo_trainer.engine.state_saver import CapturedState, Saved, StateSaver
from apollo_trainer.engine.status_board import KEPT_EVENTS, StatusBoard

__all__ = [
    "KEPT_EVENTS",
    "CapturedState",
    "EnginePause",
    "EngineWatch",
    "ModelOwner",
    "Saved",
    "ServerInfo",
    "Session",
    "StateSaver",
    "StatusBoard",
    "coherence_of",
    "engine_is_gone",
    "new_optimizer",
    "no_engine",
    "prepare",
    "undo_of",
    "version_changed",
]
