"""What a run is told in Python is what its spec says, or is refused by the option's name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_client import ApolloClient, RunOptions, run_spec
from apollo_client.forms import PROBES, SAMPLES
from apollo_client.sample_files import read_placed
from apollo_grpc.errors import FieldViolation, InvalidArgument, Quota
from apollo_grpc.v1 import training_pb2 as pb
from tests.client.scripted_server import Scripted, serving

SAMPLE = ("a", "b")
OTHER = ("c", "d")
TEXT = pb.Sample(text=pb.TextSample(context="c", continuation="d"))
PROBE = {"prompt": "c", "expected": "d"}
MIB_OF_TEXT = ("a" * 2**20, "b")


def spec(**options: Any) -> pb.RunSpec:
    """Of a run of one sample, which is left out."""
    made = run_spec([SAMPLE], options)
    assert len(made.samples) == 1
    del made.samples[:]
    return made


def test_an_option_that_is_not_given_is_not_set() -> None:
    nothing = dict.fromkeys(RunOptions.__annotations__)
    empty = {"anchors": [], "probes": [], "evaluation_samples": [], "layers": [], "include": []}
    assert spec() == spec(**nothing) == spec(**empty) == spec(accept_if=False) == pb.RunSpec()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss": "cross_entropy"}, {"cross_entropy": pb.CrossEntropy()}),
        ({"loss": "policy_gradient"}, {"policy_gradient": pb.PolicyGradient()}),
        (
            {"loss": "context_distillation", "top_k": 5},
            {"context_distillation": pb.ContextDistillation(top_k=5)},
        ),
        (
            {"clip_low": 0, "clip_high": 0.3, "loss": "policy_gradient"},
            {"policy_gradient": pb.PolicyGradient(clip_low=0, clip_high=0.3)},
        ),
        ({"anchors": [OTHER]}, {"anchors": pb.Anchors(samples=[TEXT])}),
        ({"regression_set": True}, {"anchors": pb.Anchors(regression_set=True)}),
        (
            {"anchor_loss": "replay", "anchor_weight": 0, "anchors_per_step": 3},
            {"anchors": pb.Anchors(loss=pb.ANCHOR_LOSS_REPLAY, weight=0, samples_per_step=3)},
        ),
        ({"anchor_loss": "kl"}, {"anchors": pb.Anchors(loss=pb.ANCHOR_LOSS_KL)}),
        ({"probes": [PROBE]}, {"probes": [pb.Probe(sample=TEXT)]}),
        ({"accept_if": True}, {"accept_if": pb.AcceptIf()}),
        ({"accept_if": {}}, {"accept_if": pb.AcceptIf()}),
        (
            {"accept_if": {"max_failed": 1, "max_lost": 2, "max_anchor_kl": 0}},
            {"accept_if": pb.AcceptIf(max_failed=1, max_lost=2, max_anchor_kl=0)},
        ),
        (
            {"accept_if": {"forget_probes": True, "max_anchor_kl": None}},
            {"accept_if": pb.AcceptIf(forget_probes=True)},
        ),
        (
            {"evaluation_samples": [OTHER], "evaluate_every_steps": 5},
            {"evaluation_samples": [TEXT], "evaluate_every_steps": 5},
        ),
        (
            {"include": ["*.mlp.*"], "exclude": ("lm_head*",), "layers": range(2)},
            {
                "parameters": pb.ParameterFilter(
                    include=["*.mlp.*"], exclude=["lm_head*"], layers=[0, 1]
                )
            },
        ),
        (
            {"schedule": "cosine", "final_lr_fraction": 0, "clip_grad_norm": 1},
            {
                "optimizer": pb.OptimizerConfig(
                    schedule=pb.SCHEDULE_COSINE, final_lr_fraction=0, clip_grad_norm=1
                )
            },
        ),
        (
            {"variant": "mini", "rounding": "split16"},
            {
                "optimizer": pb.OptimizerConfig(
                    variant=pb.OPTIMIZER_VARIANT_MINI, rounding=pb.ROUNDING_SPLIT16
                )
            },
        ),
    ],
)
def test_an_option_is_what_the_spec_says(options: dict[str, Any], told: dict[str, Any]) -> None:
    assert spec(**options) == pb.RunSpec(**told)


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"loss": "mse"}, "loss", "one of cross_entropy, context_distillation, policy_gradient"),
        ({"loss": 3}, "loss", "one of"),
        ({"top_k": 3}, "top_k", "is for the loss context_distillation alone"),
        ({"loss": "policy_gradient", "top_k": 3}, "top_k", "context_distillation"),
        ({"loss": "cross_entropy", "clip_low": 0}, "clip_low", "policy_gradient"),
        ({"anchor_loss": "l2"}, "anchor_loss", "'l2'; it is one of kl, replay"),
        ({"anchors": [OTHER, {"id": 1}]}, "anchors[1]", "forms"),
        ({"anchors": "none.jsonl"}, "none.jsonl", "cannot be read: No such file"),
        ({"evaluation_samples": [3]}, "evaluation_samples[0]", "forms"),
        ({"probes": {"prompt": 1}}, "probes", "is no list of probes, nor a file"),
        ({"probes": [PROBE, {"prompt": "a"}]}, "probes[1]", "expected: is missing"),
        ({"accept_if": "max_failed=1"}, "accept_if", "neither True nor"),
        ({"accept_if": {"max_kl": 1}}, "accept_if.max_kl", "max_failed, max_lost, max_anchor_kl"),
        ({"accept_if": {"max_failed": "1"}}, "accept_if.max_failed", "'1'"),
        ({"include": "*.mlp.*"}, "include", "is no list"),
        ({"include": ["a", 3]}, "include[1]", "cannot be 3"),
        ({"layers": [0, 2**31]}, "layers[1]", "out of range"),
        ({"schedule": "step"}, "schedule", "it is one of constant, linear, cosine"),
        ({"schedule": True}, "schedule", "cannot be True"),
        ({"clip_grad_norm": "1"}, "clip_grad_norm", "'1'"),
        ({"evaluate_every_steps": 1.5}, "evaluate_every_steps", "1.5"),
        ({"learning_rate": 1}, "learning_rate", "is no option of a run"),
        ({"lr": 10**5000}, "lr", "a number of so many digits"),
        ({"guard": 1}, "guard", "is no option of a run"),
    ],
)
def test_what_no_spec_holds_is_refused_at_its_name(
    options: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        spec(**options)
    assert [violation.field for violation in refused.value.violations] == [field]
    assert words in refused.value.message


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 2**31, 10**400, 1e308, float("nan"), float("inf")])
    | st.sampled_from(["", "kl", "cosine", "live", "context_distillation", "\ud83d", "\x1b[31m"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "expected", "context", "continuation", "max_failed", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*RunOptions.__annotations__, "guard"]), ANYTHING))
def test_whatever_an_option_is_it_is_taken_or_refused(options: dict[str, Any]) -> None:
    try:
        assert isinstance(run_spec([SAMPLE], options), pb.RunSpec)
    except InvalidArgument as error:
        assert error.violations and error.message.isprintable()
        assert len(error.message) < 500


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize("name", RunOptions.__annotations__)
def test_whatever_is_nested_too_deep_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        spec(**{name: deep()})


def refusal(scripted: Scripted, samples: Any, **options: Any) -> InvalidArgument:
    """What a caller hears of a run that the server refuses."""
    with serving(scripted) as address, ApolloClient(address) as client:
        with pytest.raises(InvalidArgument) as refused:
            list(client.train(samples, **options))
        return refused.value


# Where the server finds something, and how the caller has named it.
FOUND = {
    "spec.samples[1].text.continuation": ("facts.jsonl:2", "continuation"),
    "spec.anchors.samples[0].text.context": ("anchors.jsonl:2", "context"),
    "spec.evaluation_samples[1].weight": ("held.jsonl:3", "weight"),
    "spec.probes[0].sample.text.context": ("probes.jsonl:1", "prompt"),
    "spec.probes[1].sample.text.continuation": ("probes.jsonl:3", "expected"),
    "spec.probes[1].sample.chat.messages": ("probes.jsonl:3", "messages"),
    "spec.probes[0].max_tokens": ("probes.jsonl:1", "max_tokens"),
}


def test_what_the_server_refuses_is_told_by_the_line_of_each_file(tmp_path) -> None:
    line, probe = '{"context": "a", "continuation": "b"}\n', '{"prompt": "a", "expected": "b"}\n'
    for name, text in [
        ("facts", line * 2),
        ("anchors", "\n" + line),
        ("held", "\n" + line * 2),
        ("probes", probe + "\n" + probe),
    ]:
        (tmp_path / f"{name}.jsonl").write_text(text)
    samples = read_placed(tmp_path / "facts.jsonl", SAMPLES)
    options: Any = {
        "anchors": read_placed(tmp_path / "anchors.jsonl", SAMPLES),
        "evaluation_samples": read_placed(tmp_path / "held.jsonl", SAMPLES),
        "probes": read_placed(tmp_path / "probes.jsonl", PROBES),
    }
    scripted = Scripted()
    scripted.refusal = InvalidArgument(
        "wrong", violations=[FieldViolation(path, "is wrong") for path in FOUND]
    )
    refused = refusal(scripted, samples, **options)
    told = [(v.field, v.description) for v in refused.violations]
    assert told == [(f"{tmp_path}/{place}", f"{key}: is wrong") for place, key in FOUND.values()]


def test_what_the_server_refuses_of_a_list_is_told_by_the_callers_own_item() -> None:
    talk = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": 1},
            {"role": "assistant", "content": "c"},
        ]
    }
    scripted = Scripted()
    paths = ["spec.anchors.samples[2].text", "spec.anchors.weight", "spec.anchors.samples"]
    scripted.refusal = InvalidArgument(
        "wrong",
        violations=[FieldViolation(path, "has 3 samples; a run takes at most 2") for path in paths],
        quota=Quota("samples", "at most 2"),
    )
    refused = refusal(scripted, [SAMPLE], anchors=[talk, OTHER])
    assert refused.quota == Quota("samples", "at most 2")
    found = refused.violations
    assert [violation.field for violation in found] == ["spec.anchors.samples[1].text", *paths[1:]]
    advice = "up to spec.anchors.samples[0] they fit: leave out the rest"
    assert found[2].description.endswith(advice)


@pytest.mark.parametrize(
    ("anchors", "samples", "words"),
    [
        (
            70,
            1,
            r"spec.anchors.samples: holds 70\.0 MiB .*\[62\] they fit: leave out the rest",
        ),
        (40, 40, r"spec.samples: holds 40\.0 MiB of samples beside 40\.0 MiB of others; .*\[22\]"),
    ],
)
def test_more_than_a_request_holds_is_told_of_the_list_that_does_not_fit(
    anchors: int, samples: int, words: str
) -> None:
    client = ApolloClient("unix:/nowhere/training.sock")
    with client, pytest.raises(InvalidArgument, match=words):
        client.train([MIB_OF_TEXT] * samples, anchors=[MIB_OF_TEXT] * anchors)
