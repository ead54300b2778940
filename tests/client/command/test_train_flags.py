"""What `apollo train` and `apollo probes` tell the server, and how they end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import json_format

from apollo_grpc.errors import FieldViolation, InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from tests.client.scripted_server import Scripted, serving
from tests.command_line import apollo

SAMPLE = pb.Sample(text=pb.TextSample(context="a", continuation="b"))
PROBE = pb.Probe(name="sea", sample=SAMPLE)
REJECTED = pb.RunEvent.Finished(
    state=pb.RUN_STATE_REJECTED,
    failure=pb.Notice(reason="PROBES_FAILED", message="1 of 1 probes failed."),
)
SUCCEEDED = pb.RunEvent.Finished(state=pb.RUN_STATE_SUCCEEDED)
STEP = pb.RunEvent.Step(step=1, anchor_loss=0.5, policy=pb.PolicyFigures(kl=0.25))
PROBED = pb.RunEvent.Probed(results=[pb.ProbeResult(name="sea", answer="wet")])
EVENTS = [
    pb.RunEvent(started=pb.RunEvent.Started(steps_total=1)),
    pb.RunEvent(probed=PROBED),
    pb.RunEvent(step=STEP),
    pb.RunEvent(evaluated=pb.RunEvent.Evaluated(step=1, evaluation_losses=[2])),
]


@pytest.fixture
def scripted() -> Scripted:
    return Scripted([*EVENTS, pb.RunEvent(finished=SUCCEEDED)])


@pytest.fixture
def address(scripted: Scripted) -> Iterator[str]:
    with serving(scripted) as address:
        yield address


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a file of each kind."""
    line = '{"context": "a", "continuation": "b"}\n'
    for name in ("facts", "anchors", "held"):
        (tmp_path / f"{name}.jsonl").write_text(line)
    probe = {"prompt": "a", "expected": "b", "name": "sea"}
    (tmp_path / "probes.jsonl").write_text(json.dumps(probe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


FLAGS = {
    "--name mine --label team=a --label empty= --expected-weight-version 0": {
        "name": "mine",
        "labels": {"team": "a", "empty": ""},
        "expected_weight_version": 0,
    },
    "--loss context_distillation": {"context_distillation": pb.ContextDistillation()},
    "--anchors anchors.jsonl --anchor-weight 0.5 --anchors-per-step 3": {
        "anchors": pb.Anchors(samples=[SAMPLE], weight=0.5, samples_per_step=3)
    },
    "--regression-set --anchor-loss replay": {
        "anchors": pb.Anchors(regression_set=True, loss=pb.ANCHOR_LOSS_REPLAY)
    },
    "--probes probes.jsonl --accept-if max_failed=0": {
        "probes": [PROBE],
        "accept_if": pb.AcceptIf(),
    },
    "--accept-if max_lost=2 --accept-if max_anchor_kl=0.1 --accept-if forget_probes=true": {
        "accept_if": pb.AcceptIf(max_lost=2, max_anchor_kl=0.1, forget_probes=True)
    },
    "--evaluation held.jsonl --evaluate-every 5": {
        "evaluation_samples": [SAMPLE],
        "evaluate_every_steps": 5,
    },
    "--include *.mlp.* --include *.attn.* --exclude *.bias --layers 0 --layers 3": {
        "parameters": pb.ParameterFilter(
            include=["*.mlp.*", "*.attn.*"], exclude=["*.bias"], layers=[0, 3]
        )
    },
    "--schedule cosine --final-lr-fraction 0 --clip-grad-norm 1": {
        "optimizer": pb.OptimizerConfig(
            schedule=pb.SCHEDULE_COSINE, final_lr_fraction=0, clip_grad_norm=1
        )
    },
    "--min-loss 0 --evaluate --epochs 2": {
        "guard": pb.Guard(min_loss=0),
        "evaluate": True,
        "epochs": 2,
    },
    "": {},
}


@pytest.mark.parametrize("flags", FLAGS)
def test_a_flag_is_what_the_spec_says(
    scripted: Scripted, address: str, files: Path, flags: str
) -> None:
    done = apollo("--address", address, "train", "facts.jsonl", *flags.split())
    assert done.returncode == 0, done.stderr
    assert scripted.asked[0].spec == pb.RunSpec(samples=[SAMPLE], **FLAGS[flags])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--loss mse", "loss: cannot be 'mse'; it is one of cross_entropy"),
        ("--schedule step", "schedule: cannot be 'step'; it is one of constant"),
        ("--accept-if max_failed", "--accept-if: cannot be max_failed: it is KEY=VALUE"),
        ("--accept-if kl=1", "accept_if.kl: is none of max_failed"),
        ("--accept-if max_failed=no", "accept_if.max_failed: cannot be 'no'"),
        ("--anchors none.jsonl", "none.jsonl: cannot be read: No such file"),
        ("--probes facts.jsonl", "facts.jsonl:1: context: is called prompt in a probe"),
        ("--evaluation probes.jsonl", "probes.jsonl:1: expected: is no key of a sample"),
        ("--layers first", "--layers"),
    ],
)
def test_a_wrong_flag_or_file_is_told_before_any_call(
    scripted: Scripted, address: str, files: Path, flags: str, words: str
) -> None:
    done = apollo("--address", address, "train", "facts.jsonl", *flags.split())
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not scripted.asked


def test_what_the_server_refuses_is_told_by_the_line_of_the_flags_file(
    scripted: Scripted, address: str, files: Path
) -> None:
    paths = ["spec.probes[0].sample.text.context", "spec.anchors.samples[0].weight"]
    scripted.refusal = InvalidArgument(
        "wrong", violations=[FieldViolation(path, "is wrong") for path in paths]
    )
    flags = ("--probes", "probes.jsonl", "--anchors", "-")
    line = '\n{"context": "a", "continuation": "b"}'
    done = apollo("--address", address, "train", "facts.jsonl", *flags, input=line)
    assert done.returncode == 2
    assert "probes.jsonl:1: prompt: is wrong" in done.stderr
    assert "stdin:2: weight: is wrong" in done.stderr


def test_a_rejected_run_ends_as_a_failed_one_does(
    scripted: Scripted, address: str, files: Path
) -> None:
    scripted.events[-1] = pb.RunEvent(finished=REJECTED)
    done = apollo("--address", address, "train", "facts.jsonl")
    assert done.returncode == 1
    assert done.stdout.endswith("rejected: 1 of 1 probes failed. (PROBES_FAILED)\n")


def test_programs_are_told_all_that_the_server_says(
    scripted: Scripted, address: str, files: Path
) -> None:
    done = apollo("--address", address, "train", "facts.jsonl", "--json")
    told = [json_format.Parse(line, pb.RunEvent()) for line in done.stdout.splitlines()]
    assert told == scripted.events


def test_the_regression_set_is_listed(scripted: Scripted, address: str) -> None:
    chat = pb.ChatSample(
        messages=[
            pb.ChatMessage(role="user", content="Who?"),
            pb.ChatMessage(role="assistant", content="I.\n"),
        ]
    )
    ids = pb.TokenSample(context_ids=[1, 2], continuation_ids=[3])
    scripted.probes = [
        PROBE,
        pb.Probe(name="talk", sample=pb.Sample(chat=chat), check=pb.PROBE_CHECK_EXACT),
        pb.Probe(name="\x1b[31m", sample=pb.Sample(tokens=ids)),
    ]
    done = apollo("--address", address, "probes")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "sea  contains  a  ->  b",
        "talk  exact  Who?  ->  I.\\n",
        r"'\x1b[31m'  contains  [1, 2]  ->  [3]",
    ]
    done = apollo("--address", address, "probes", "--json")
    told = [json_format.Parse(line, pb.Probe()) for line in done.stdout.splitlines()]
    assert told == scripted.probes


def test_probes_are_deleted_by_name_or_all(scripted: Scripted, address: str) -> None:
    scripted.probes = [pb.Probe(name=name, sample=SAMPLE) for name in "abcd"]
    for wrong in ([], ["a", "--all"]):
        done = apollo("--address", address, "probes", "delete", *wrong)
        assert done.returncode == 2
        assert "name the probes to delete, or say --all" in done.stderr
    assert not scripted.asked
    done = apollo("--address", address, "probes", "delete", "a", "c", "x")
    assert (done.returncode, done.stdout) == (0, "deleted 2\n")
    done = apollo("--address", address, "probes", "delete", "--all", "--json")
    assert (json.loads(done.stdout), scripted.probes) == ({"deleted": 2}, [])
