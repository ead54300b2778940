"""The trainer ranks beside this process, which is the first: one for each of vLLM's workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb
from apollo_trainer.config import Settings
from apollo_trainer.parallel.followers import Followers
from apollo_trainer.parallel.ranks import ALONE, Ranks
from apollo_trainer.weights.attach import Checks
from apollo_trainer.weights.cuda_mapping import device_of


class OtherRanks:
    """Those of one attachment at a time; none where vLLM has one worker.

    Args:
        ended: called with a sentence once one has ended by itself. Any thread.
    """

    def __init__(self, settings: Settings, ended: Callable[[str], None]):
        self._settings, self._ended = settings, ended
        self._followers: Followers | None = None

    def begin(self, epoch: str, manifest: pb.WeightManifest, checks: Checks) -> Ranks:
        """Starts them, to attach as this process does.

        Raises FailedPrecondition on GPUs unless they are asked for, Unavailable where one does not
        start.
        """
        size = manifest.tensor_parallel_size
        if size == 1:
            return ALONE
        device = device_of(manifest.buffers)
        if device is not None and not self._settings.several_gpus:
            raise FailedPrecondition(
                f"vLLM runs with tensor parallel size {size}; training on several GPUs was never "
                "run. Serve with --tensor-parallel-size 1, or try it: --several-gpus. Nothing was "
                "written.",
                reason="TENSOR_PARALLEL_UNSUPPORTED",
            )
        told = {
            "epoch": epoch,
            "settings": self._settings.model_dump(mode="json"),
            "checks": asdict(checks),
            "on_gpus": device is not None,
        }
        self._followers = Followers(size, self._settings.state_dir, told, self._ended, device)
        return self._followers.ranks

    def listen(self) -> None:
        """From now on they do what they are told; until now, what this process did."""
        if self._followers is not None:
            self._followers.listen()

    def end(self) -> None:
        """Ends them. Idempotent."""
        if self._followers is not None:
            self._followers.end()
        self._followers = None
