# Generated from aio_sample_calls.py by `make protos`: change that file, not this one.
"""Calls that ask about samples, or about the server, and begin nothing."""

from __future__ import annotations

from typing import Unpack

from apollo_client.calls import Calls
from apollo_client.data import Columns, Samples
from apollo_client.requests import RunOptions, placed_samples, placed_spec, validate_request
from apollo_grpc.v1 import status_pb2, training_pb2
from apollo_grpc.v1.status_pb2_grpc import StatusServiceStub
from apollo_grpc.v1.training_pb2_grpc import TrainingServiceStub


class SampleCalls(Calls):
    """What samples come to, and what the server takes."""

    _training: TrainingServiceStub
    _status: StatusServiceStub

    def score(
        self, samples: Samples, *, columns: Columns = None
    ) -> training_pb2.ScoreSamplesResponse:
        """How likely vLLM finds each continuation with the weights of now; nothing is trained.

        `scores` has one for each sample, in order, in nats. Weights and the like are ignored. It
        waits for vLLM, also while a run has it paused.
        """
        found, places = placed_samples(samples, columns)
        request = training_pb2.ScoreSamplesRequest(samples=found)
        scored: training_pb2.ScoreSamplesResponse = self._asked(
            self._training.ScoreSamples, request, places
        )
        return scored

    def validate(
        self, samples: Samples = (), *, columns: Columns = None, **options: Unpack[RunOptions]
    ) -> training_pb2.ValidateRunResponse:
        """What `train` would come to, in steps and tokens; nothing begins.

        Raises what `train` would raise.
        """
        spec, places = placed_spec(samples, options, columns)
        valid: training_pb2.ValidateRunResponse = self._asked(
            self._training.ValidateRun, validate_request(spec, places), places
        )
        return valid

    def count_tokens(
        self, samples: Samples, *, columns: Columns = None
    ) -> list[training_pb2.TokenCount]:
        """How many tokens `train` would make of each sample, in order."""
        found, places = placed_samples(samples, columns)
        request = training_pb2.CountTokensRequest(samples=found)
        answer = self._asked(self._training.CountTokens, request, places)
        return list(answer.counts)

    def server_info(self) -> status_pb2.GetServerInfoResponse:
        """What the server and its model can do, and what they limit.

        `model` is unset while no engine is attached.
        """
        info: status_pb2.GetServerInfoResponse = self._answer(
            self._status.GetServerInfo, status_pb2.GetServerInfoRequest()
        )
        return info
