"""Probes of a fake server's runs, and what they decide."""

from __future__ import annotations

from apollo_client.testing.memory import KeptRun, Memory
from apollo_client.testing.script import Script
from apollo_grpc.v1 import training_pb2 as pb

# As of a server, in nats a token.
LEAST = -1.0
Verdict = tuple[pb.RunState.ValueType, pb.Notice | None]


class Asking:
    """The probes of one run. One passes where the loss of the next step would be small enough."""

    def __init__(self, memory: Memory, kept: KeptRun, script: Script):
        self._memory, self._kept, self._script = memory, kept, script
        self._spec = kept.run.spec
        regression = memory.probes.values() if self._decides else ()
        self._probes = [(probe, False) for probe in self._spec.probes]
        self._probes += [(probe, True) for probe in regression]
        self._before: list[pb.ProbeResult] = []

    @property
    def _decides(self) -> bool:
        return self._spec.HasField("accept_if") and not self._spec.dry_run

    def ask(self, loss: float, *, after: bool) -> list[pb.ProbeResult]:
        """Tells what each probe comes to at a loss."""
        results = [
            _result(str(number), probe, loss, regression=regression)
            for number, (probe, regression) in enumerate(self._probes)
        ]
        if results:
            told = pb.RunEvent.Probed(after_training=after, results=results)
            self._memory.append(self._kept, probed=told)
        self._before = self._before or results
        return results

    def verdict(self) -> Verdict:
        """Asks after the last step; how the run ends by that."""
        if self._spec.dry_run or not self._probes:
            return pb.RUN_STATE_SUCCEEDED, None
        steps = sum(event.HasField("step") for event in self._kept.events)
        results = self.ask(self._script.loss(steps + 1), after=True)
        if not self._decides:
            return pb.RUN_STATE_SUCCEEDED, None
        failed = [r for r in results if r.role == pb.PROBE_ROLE_LEARN and not r.passed]
        pairs = zip(self._before, results, strict=True)
        lost = [now for was, now in pairs if was.passed and not now.passed]
        accept = self._spec.accept_if
        for found, most, reason in (
            (failed, accept.max_failed, "PROBES_FAILED"),
            (lost, accept.max_lost, "PROBES_LOST"),
        ):
            if len(found) > most:
                words = f"{len(found)} probes failed, and {most} may; the run was taken back."
                return pb.RUN_STATE_REJECTED, pb.Notice(reason=reason, message=words)
        self._keep(results)
        return pb.RUN_STATE_SUCCEEDED, None

    def _keep(self, results: list[pb.ProbeResult]) -> None:
        if self._spec.accept_if.forget_probes:
            return
        for (probe, regression), result in zip(self._probes, results, strict=True):
            if result.passed and not regression and result.role == pb.PROBE_ROLE_LEARN:
                kept = pb.Probe()
                kept.CopyFrom(probe)
                kept.name, kept.role = result.name, pb.PROBE_ROLE_KEEP
                self._memory.probes[result.name] = kept


def _result(number: str, probe: pb.Probe, loss: float, *, regression: bool) -> pb.ProbeResult:
    least = probe.min_log_probability if probe.HasField("min_log_probability") else LEAST
    passed, scored = -loss >= least, probe.check == pb.PROBE_CHECK_LOG_PROBABILITY
    chat = probe.sample.chat.messages
    expected = chat[-1].content if chat else probe.sample.text.continuation
    return pb.ProbeResult(
        name=probe.name or number,
        role=probe.role or pb.PROBE_ROLE_LEARN,
        regression=regression,
        passed=passed,
        expected=expected,
        answer=expected if passed and not scored else "",
        log_probability=-loss if scored else None,
    )
