"""What a run looks at beside its steps: losses of samples, how far anchors moved, probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from apollo_grpc.errors import ApolloError
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.engine import Session
from apollo_trainer.ledger import EventLog
from apollo_trainer.requests.losses import TOP_K
from apollo_trainer.requests.probes import Question
from apollo_trainer.runs.probing import Probing, not_asked
from apollo_trainer.runs.run import PreparedRun
from apollo_trainer.runs.self_made import Punctuation, SelfMade, begin_of_text
from apollo_trainer.training.evaluate import evaluate
from apollo_trainer.training.samples import TokenizedSample, TopTokens
from apollo_trainer.training.teacher import top_tokens
from apollo_trainer.weights.sidecar import Sidecar


class Evaluation:
    """Reads the weights and writes nothing: vLLM decodes meanwhile. Training thread.

    Args:
        require_going: called before each micro-batch; what it raises ends the run.
        warn: called with a reason and a message where probes could not be asked.

    Attributes:
        run: with what its teachers said, once `begin` has asked them.
        anchor_loss: mean over all tokens of the anchors after the last step; None before.
    """

    def __init__(
        self,
        session: Session,
        sidecar: Sidecar,
        log: EventLog,
        run: PreparedRun,
        require_going: Callable[[], None],
        warn: Callable[[str, str], None],
    ):
        self._session, self._sidecar, self._log, self.run = session, sidecar, log, run
        self._require_going, self._warn = require_going, warn
        self._probing = Probing(session, sidecar, log, run)
        self.anchor_loss: float | None = None

    def begin(self) -> None:
        """Everything that is asked of the weights before the first step."""
        run = self.run
        asked = run.anchor_options.regression_set
        regression = list(map(_anchor, self._probing.regression)) if asked else []
        sources = (run.anchors, regression, *self._self_made())
        anchors = tuple(anchor for source in sources for anchor in source)
        if run.loss.kind == "context_distillation":
            run = replace(run, samples=self._taught(run.samples, run.loss.top_k))
        if not run.anchor_options.keeps_distribution:
            anchors = tuple(replace(anchor, targets=None) for anchor in anchors)
        else:
            anchors = self._taught(anchors, TOP_K)
        self.run = replace(run, anchors=anchors, anchor_sources=tuple(map(len, sources)))
        self._probing.before()
        self._tell(0)

    def _self_made(self) -> list[list[TokenizedSample]]:
        """What the model says about subjects of each kind that is learned, and of its own."""
        options, session = self.run.anchor_options, self._session
        if not options.subjects and not options.texts:
            return []
        answer = partial(self._sidecar.answer, session.attachment.epoch)
        punctuation = Punctuation.of(self._sidecar.tokenize)
        maker = SelfMade(answer, self._likeliest, punctuation)
        about = maker.about(self.run.by_kind(), options.subjects)
        about = [self._surest(said, options.subjects) for said in about]
        return [*about, maker.texts(begin_of_text(session.attachment.model), options.texts)]

    def _surest(self, said: list[TokenizedSample], most: int) -> list[TokenizedSample]:
        """Those of the model's own answers that it is surest of, which it may well know."""
        pairs = list(zip(said, self._top(said, TOP_K), strict=True))
        pairs.sort(key=lambda pair: float(pair[1].log_probs[:, 0].mean()), reverse=True)
        return [replace(sample, targets=top) for sample, top in pairs[:most]]

    def _likeliest(self, prompts: Sequence[tuple[int, ...]], count: int) -> list[list[int]]:
        """Tokens that may follow each prompt, the likeliest first."""
        samples = [TokenizedSample(prompt, prompt[-1:]) for prompt in prompts]
        return [top.ids[0].tolist() for top in self._top(samples, count)]

    def after_step(self, step: int) -> None:
        """Tells the evaluation samples' losses where that is due."""
        every = self.run.evaluate_every
        if every and step % every == 0 and step < self.run.steps_total and self.run.evaluated:
            found = self._losses(self.run.evaluated)
            self._log.append(evaluated=pb.RunEvent.Evaluated(step=step, evaluation_losses=found))

    def end(self, steps_done: int) -> None:
        """The same after the last step; a dry run changes no answer.

        Raises Rejected where probes that decide cannot be asked.
        """
        anchors = self._losses(self.run.anchors, own_loss=True)
        if anchors:
            tokens = [len(sample.continuation_ids) for sample in self.run.anchors]
            weighed = math.fsum(a * n for a, n in zip(anchors, tokens, strict=True))
            self.anchor_loss = weighed / sum(tokens)
        self._tell(steps_done, anchors, after_training=True)
        if self.run.dry_run:
            return
        try:
            self._probing.after()
        except ApolloError as error:
            if not self._session.attachment.alive:
                raise
            if self.run.accept_if is not None:
                raise not_asked(error) from error
            self._warn("PROBES_NOT_ASKED", f"The probes could not be asked: {error.message}")

    def require_accepted(self) -> None:
        """Raises Rejected where the run is not to be kept; else its probes are. Raises OSError."""
        self._probing.require_accepted(self.anchor_loss)
        self._probing.keep()

    def _taught(
        self, samples: tuple[TokenizedSample, ...], top_k: int
    ) -> tuple[TokenizedSample, ...]:
        """The samples with what the weights expect next, as far as they do not have it yet."""
        new = iter(self._top([s for s in samples if s.targets is None], top_k))
        return tuple(s if s.targets else replace(s, targets=next(new)) for s in samples)

    def _top(self, samples: Sequence[TokenizedSample], k: int) -> list[TopTokens]:
        budget, model = self._session.settings.token_budget, self._session.attachment.model
        with self._session.pace.place():
            return top_tokens(model, samples, k, budget, self._require_going)

    def _tell(
        self, step: int, anchors: Sequence[float] = (), *, after_training: bool = False
    ) -> None:
        run = self.run
        losses = self._losses(run.samples) if run.evaluate else ()
        evaluated = self._losses(run.evaluated)
        if run.evaluate or run.evaluated or anchors:
            self._log.append(
                evaluated=pb.RunEvent.Evaluated(
                    after_training=after_training,
                    losses=losses,
                    step=step,
                    evaluation_losses=evaluated,
                    anchor_losses=anchors,
                )
            )

    def _losses(
        self, samples: tuple[TokenizedSample, ...], *, own_loss: bool = False
    ) -> Sequence[float]:
        """Of each sample, in nats a token."""
        budget, model = self._session.settings.token_budget, self._session.attachment.model
        with self._session.pace.place():
            return evaluate(model, samples, budget, self._require_going, own_loss=own_loss)


def _anchor(question: Question) -> TokenizedSample:
    return TokenizedSample(question.prompt_ids, question.expected_ids)
