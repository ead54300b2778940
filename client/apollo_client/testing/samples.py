"""What a fake server says of samples and probes without a run."""

from __future__ import annotations

from typing import Any

from apollo_client.testing.checks import check_samples, tokens_of
from apollo_client.testing.memory import Memory
from apollo_client.testing.paging import page_of, refuse, wrong_page
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb

MAX_SCORED = 1024


class Samples:
    """Each method is an RPC of TrainingService by its name."""

    def __init__(self, memory: Memory):
        self._memory = memory

    def count_tokens(self, request: pb.CountTokensRequest, context: Any) -> pb.CountTokensResponse:
        """Each word of a text is a token."""
        check_samples(request.samples, "samples[{}]")
        return pb.CountTokensResponse(counts=[tokens_of(sample) for sample in request.samples])

    def score_samples(
        self, request: pb.ScoreSamplesRequest, context: Any
    ) -> pb.ScoreSamplesResponse:
        """Each token has the script's first loss."""
        if len(request.samples) > MAX_SCORED:
            raise InvalidArgument.at("samples", f"are more than {MAX_SCORED}")
        check_samples(request.samples, "samples[{}]")
        each, version = -self._memory.script.loss(1), self._memory.weight_version
        answer = pb.ScoreSamplesResponse(
            weight_version_before=version, weight_version_after=version
        )
        for tokens in (tokens_of(sample).continuation_tokens for sample in request.samples):
            answer.scores.add(log_probabilities=[each] * tokens, log_probability=each * tokens)
        return answer

    def list_regression_probes(
        self, request: pb.ListRegressionProbesRequest, context: Any
    ) -> pb.ListRegressionProbesResponse:
        """A page of probes, by name."""
        refuse(wrong_page(request))
        with self._memory.changed:
            named = list(enumerate(sorted(self._memory.probes.items()), 1))
        page, token = page_of(named, lambda each: each[0], request, rising=True)
        probes = [probe for _, (_, probe) in page]
        return pb.ListRegressionProbesResponse(probes=probes, next_page_token=token)

    def delete_regression_probes(
        self, request: pb.DeleteRegressionProbesRequest, context: Any
    ) -> pb.DeleteRegressionProbesResponse:
        """All of them where none is named."""
        with self._memory.changed:
            probes = self._memory.probes
            gone = [name for name in probes if not request.names or name in request.names]
            for name in gone:
                del probes[name]
        return pb.DeleteRegressionProbesResponse(deleted=len(gone))
