"""What the command prints of events."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from apollo_client.command.events import event_line, probe_table
from apollo_client.command.run_display import RunDisplay
from apollo_client.requests import run_spec
from apollo_grpc.v1 import training_pb2 as pb

MESSAGE = "All samples are learned."
STEP = pb.RunEvent.Step(step=3, loss=1.25, grad_norm=2)
BEFORE = pb.RunEvent.Probed(
    results=[
        pb.ProbeResult(name="sea", role=pb.PROBE_ROLE_LEARN, expected="deep", answer="blue"),
        pb.ProbeResult(name="sun", role=pb.PROBE_ROLE_KEEP, passed=True, answer="hot"),
    ]
)
AFTER = pb.RunEvent.Probed(
    after_training=True,
    results=[
        pb.ProbeResult(
            name="sea",
            role=pb.PROBE_ROLE_LEARN,
            passed=True,
            expected=" deep",
            answer=" deep\n\x1b[31mand " + "w" * 99,
        ),
        pb.ProbeResult(name="sun", role=pb.PROBE_ROLE_KEEP, expected="hot", log_probability=-4.5),
        pb.ProbeResult(
            name="sea", role=pb.PROBE_ROLE_KEEP, regression=True, passed=True, expected="海"
        ),
    ],
)


def line(**event: object) -> str:
    told = event_line(pb.RunEvent(**event))  # type: ignore[arg-type]
    assert "\n" not in told
    return told


def test_a_run_that_ended_early_says_why_in_its_last_line() -> None:
    finished = pb.RunEvent.Finished(state=pb.RUN_STATE_SUCCEEDED, steps_done=9, weight_version=9)
    assert line(finished=finished).endswith("vLLM paused for 0.00 s")
    finished.stopped.CopyFrom(pb.Notice(reason="GUARD_MIN_LOSS", message=MESSAGE))
    told = line(finished=finished)
    assert told.startswith("succeeded: 9 steps") and told.endswith(MESSAGE)


def test_a_run_that_was_taken_back_says_why_in_its_last_line() -> None:
    failure = pb.Notice(reason="PROBES_FAILED", message="2 of 3 probes failed.")
    finished = pb.RunEvent.Finished(state=pb.RUN_STATE_REJECTED, failure=failure)
    assert line(finished=finished) == "rejected: 2 of 3 probes failed. (PROBES_FAILED)"


def test_a_smallest_loss_of_0_is_told_to_the_server() -> None:
    assert run_spec([("a", "b")], {"min_loss": 0}).guard.HasField("min_loss")
    assert not run_spec([("a", "b")], {}).guard.HasField("min_loss")


def test_the_loss_of_anchors_stands_beside_that_of_the_step() -> None:
    assert "loss 1.2500  grad norm" in line(step=STEP)
    beside = pb.RunEvent.Step(loss=1.25, anchor_loss=0)
    assert "loss 1.2500  anchors 0.0000  grad norm" in line(step=beside)


def test_a_step_of_a_policy_gradient_tells_its_ratio_divergence_and_clipping() -> None:
    policy = pb.PolicyFigures(mean_ratio=1.0625, kl=0.03125, clipped_fraction=0.125)
    told = line(step=pb.RunEvent.Step(loss=-0.5, policy=policy))
    assert "loss -0.5000  ratio 1.062  kl 0.0312  clipped 12.5%" in told


@pytest.mark.parametrize(
    ("evaluated", "told"),
    [
        (
            pb.RunEvent.Evaluated(losses=[1, 2]),
            "loss of each sample before: 1.0000 2.0000 (mean 1.5000)",
        ),
        (
            pb.RunEvent.Evaluated(step=5, evaluation_losses=[3]),
            "loss of each evaluation sample after step 5: 3.0000",
        ),
        (
            pb.RunEvent.Evaluated(
                after_training=True, step=9, losses=[1], evaluation_losses=[2], anchor_losses=[0.5]
            ),
            "loss of each sample after: 1.0000; loss of each evaluation sample after: 2.0000; "
            "loss of each anchor after: 0.5000",
        ),
    ],
)
def test_losses_are_told_by_what_they_are_of_and_when(
    evaluated: pb.RunEvent.Evaluated, told: str
) -> None:
    assert line(evaluated=evaluated) == told


def test_probes_are_counted_in_a_line_and_told_in_a_table() -> None:
    assert line(probed=BEFORE) == "probes passed before: 1 of 2"
    assert line(probed=AFTER) == "probes passed after: 2 of 3"
    header, sea, sun, regression = probe_table(BEFORE, AFTER)
    assert header.split() == ["probe", "role", "before", "after", "expected", "answer"]
    assert sea.startswith("sea    learn ") and "failed  passed" in sea
    assert sun.split() == ["sun", "keep", "passed", "failed", "hot", "log-probability", "-4.500"]
    assert regression.split() == ["sea", "keep,", "regression", "-", "passed", "海"]
    assert all(told.isprintable() and len(told) < 160 for told in (header, sea, sun))
    at = header.index("expected")
    assert sea[at:].startswith(" deep ") and sun[at:].startswith("hot") and "海" in regression[at:]
    assert sea.endswith("www...")


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_the_table_comes_once_the_run_has_probed_again(
    terminal: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = pb.RunEvent.Finished(state=pb.RUN_STATE_SUCCEEDED)
    events = [
        pb.RunEvent(started=pb.RunEvent.Started(steps_total=3)),
        pb.RunEvent(probed=BEFORE),
        pb.RunEvent(step=pb.RunEvent.Step(step=3, loss=1.25, anchor_loss=0.5)),
        pb.RunEvent(probed=AFTER),
        pb.RunEvent(finished=finished),
    ]
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=200)
    assert RunDisplay(console).follow(events) == finished
    told = written.getvalue() if terminal else capsys.readouterr().out
    assert told.count("log-probability -4.500") == 1
    table = told[told.index("probes passed after") :]
    assert "failed  passed" in table and "1.2500  anchors 0.5000" in told
