"""What vLLM is asked before a run and after it, and whether that keeps the run."""

from __future__ import annotations

from collections.abc import Sequence

from apollo_grpc.errors import ApolloError, FailedPrecondition, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine import Session
from apollo_trainer.ledger import EventLog
from apollo_trainer.requests.probes import Question, read_probes
from apollo_trainer.runs.regression_set import RegressionSet
from apollo_trainer.runs.run import PreparedRun
from apollo_trainer.weights.sidecar import Sidecar


class Rejected(Exception):
    """The run did not reach what its `accept_if` asks for."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.failure = pb.Notice(reason=reason, message=message)


class Probing:
    """The probes of one run, and those of the regression set where it is asked. Training thread.

    Raises FailedPrecondition where the regression set cannot be asked.
    """

    def __init__(self, session: Session, sidecar: Sidecar, log: EventLog, run: PreparedRun):
        self._session, self._sidecar, self._log, self._run = session, sidecar, log, run
        self._set = regression_set_of(session)
        asked = run.accept_if is not None or run.anchor_options.regression_set
        self.regression = self._questions_of_set() if asked else ()
        own = {question.name for question in run.probes}
        # A probe that is sent again is asked as the one that was sent.
        others = [question for question in self.regression if question.name not in own]
        self._questions = (*run.probes, *(others if run.accept_if is not None else ()))
        self._before: tuple[pb.ProbeResult, ...] = ()
        self._after: tuple[pb.ProbeResult, ...] = ()

    def before(self) -> None:
        """Asks before the first step. Raises as `Sidecar.answer`."""
        self._before = self._ask(after_training=False)

    def after(self) -> None:
        """Asks after the last step. Raises as `Sidecar.answer`."""
        self._after = self._ask(after_training=True)

    def _ask(self, *, after_training: bool) -> tuple[pb.ProbeResult, ...]:
        if not self._questions:
            return ()
        prompts = [question.prompt for question in self._questions]
        answers = self._sidecar.answer(self._session.attachment.epoch, prompts)
        results = tuple(q.result(a) for q, a in zip(self._questions, answers, strict=True))
        self._log.append(probed=pb.RunEvent.Probed(after_training=after_training, results=results))
        return results

    def require_accepted(self, anchor_kl: float | None) -> None:
        """Raises Rejected where the run is not to be kept.

        Args:
            anchor_kl: mean over all tokens of the anchors, after the last step.
        """
        accept = self._run.accept_if or pb.AcceptIf()
        failed = [r.name for r in self._after if r.role == pb.PROBE_ROLE_LEARN and not r.passed]
        pairs = zip(self._before, self._after, strict=True)
        lost = [after.name for before, after in pairs if before.passed and not after.passed]
        _require_few("PROBES_FAILED", "did not pass afterwards", "max_failed", failed,
                     accept.max_failed)  # fmt: skip
        _require_few("PROBES_LOST", "passed before and not afterwards", "max_lost", lost,
                     accept.max_lost)  # fmt: skip
        limit = accept.max_anchor_kl if accept.HasField("max_anchor_kl") else None
        if limit is not None and anchor_kl is not None and not anchor_kl <= limit:
            raise Rejected(
                "ANCHORS_MOVED",
                f"The anchors moved by {anchor_kl:.4g} nats a token; accept_if.max_anchor_kl is "
                f"{limit:g}. {TAKEN_BACK}",
            )

    def keep(self) -> None:
        """Adds the run's probes that passed to the regression set. Raises OSError."""
        accept = self._run.accept_if
        if accept is None or accept.forget_probes:
            return
        passed = {r.name for r in self._after if r.passed and r.role == pb.PROBE_ROLE_LEARN}
        kept = [self._named(question) for question in self._run.probes if question.name in passed]
        if kept:
            self._set.add(kept)

    def _named(self, question: Question) -> pb.Probe:
        named = pb.Probe()
        named.CopyFrom(question.probe)
        # Another run's probes without names have the same numbers.
        named.name = question.probe.name or f"{self._log.run_id}/{question.name}"
        return named

    def _questions_of_set(self) -> tuple[Question, ...]:
        probes, limits = self._set.probes(), self._session.limits
        try:
            return read_probes(probes, limits, self._sidecar.tokenize, regression=True)
        except InvalidArgument as error:
            raise FailedPrecondition(
                f"The regression set of this model cannot be asked ({error.message}); nothing was "
                "trained. Take such probes out with 'apollo probes delete'.",
                reason="REGRESSION_SET_INVALID",
            ) from error


TAKEN_BACK = "Weights, moments and optimizer step are again what they were before the run."


def regression_set_of(session: Session) -> RegressionSet:
    """The regression set of the attached model."""
    return RegressionSet(session.state_path.parent)


def not_asked(error: ApolloError) -> Rejected:
    """The end of a run whose probes could not be asked: in doubt, nothing is kept."""
    return Rejected(
        "PROBES_NOT_ASKED",
        f"The probes could not be asked after the last step ({error.message}). {TAKEN_BACK}",
    )


def _require_few(reason: str, says: str, option: str, names: Sequence[str], most: int) -> None:
    if len(names) > most:
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise Rejected(
            reason,
            f"{len(names)} probes {says} ({some}); accept_if.{option} is {most}. {TAKEN_BACK}",
        )
