"""Probes are read as they were written, and the regression set is listed and emptied by name."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_client import read_probes, to_probe
from apollo_client.forms import PROBES
from apollo_client.sample_files import read_stream
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from tests.client.scripted_server import Scripted, serving

TEXT = {"prompt": "The sea is", "expected": " deep."}
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SAMPLE = pb.Sample(text=pb.TextSample(context="The sea is", continuation=" deep."))
KEYS = (
    *("prompt", "expected", "context", "continuation", "context_ids", "continuation_ids"),
    *("messages", "name", "check", "role", "max_tokens", "min_log_probability", "weight"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def test_each_form_is_what_was_written() -> None:
    assert to_probe(TEXT) == pb.Probe(sample=SAMPLE)
    ids = to_probe({"context_ids": [1, 2], "continuation_ids": [3]}).sample.tokens
    assert (list(ids.context_ids), list(ids.continuation_ids)) == ([1, 2], [3])
    assert [m.content for m in to_probe(CHAT).sample.chat.messages] == ["a", "b"]
    assert to_probe(to_probe(CHAT)) == to_probe(CHAT)


def test_name_check_role_and_limits_are_what_was_written() -> None:
    options = {"name": "sea", "max_tokens": 3, "min_log_probability": -2, "weight": None}
    made = to_probe({**TEXT, **options, "check": "log_probability", "role": "keep"})
    assert made == pb.Probe(
        name="sea",
        sample=SAMPLE,
        check=pb.PROBE_CHECK_LOG_PROBABILITY,
        role=pb.PROBE_ROLE_KEEP,
        max_tokens=3,
        min_log_probability=-2,
    )
    for check, number in pb.ProbeCheck.items()[1:]:
        word = check.removeprefix("PROBE_CHECK_").lower()
        assert to_probe({**TEXT, "check": word}).check == number


@pytest.mark.parametrize(
    ("value", "field", "words"),
    [
        (3, "probe", '{"prompt": "...", "expected": "..."}'),
        ({}, "probe", '{"prompt": "...", "expected": "..."}'),
        (("a", "b"), "probe", "forms"),
        ({"prompt": "a"}, "expected", "is missing"),
        ({"expected": "a"}, "prompt", "is missing"),
        ({"prompt": 3, "expected": "a"}, "prompt", "is no text"),
        ({"prompt": "a", "expected": "\ud83d"}, "expected", "half a character"),
        ({"context": "a", "continuation": "b"}, "context", "is called prompt in a probe"),
        ({**TEXT, "answer": "b"}, "answer", "with prompt and expected"),
        ({**TEXT, "check": "near"}, "check", "one of contains, exact, log_probability"),
        ({**TEXT, "role": 1}, "role", "one of learn, keep"),
        ({**TEXT, "max_tokens": "3"}, "max_tokens", "'3'"),
        ({**TEXT, "name": 3}, "name", "cannot be 3"),
        ({**TEXT, "name": "\ud83d"}, "name", "half a character"),
        ({"messages": [*CHAT["messages"], {"role": "assistant"}]}, "messages[2].content", "miss"),
        (
            {"messages": [{"role": "assistant", "content": c, "weight": 1} for c in "ab"]},
            "messages",
            "have 2 answers; a probe has one",
        ),
    ],
)
def test_what_is_no_probe_is_refused_at_its_key(value: Any, field: str, words: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        to_probe(value)
    assert [violation.field for violation in refused.value.violations] == [field]
    assert words in refused.value.message and refused.value.message.isprintable()


@given(st.dictionaries(st.sampled_from(KEYS), JSON) | JSON)
def test_whatever_json_holds_is_a_probe_or_a_refusal(value: Any) -> None:
    try:
        assert isinstance(to_probe(value), pb.Probe)
    except InvalidArgument as error:
        assert error.violations and len(error.message) < 500


def test_a_file_holds_what_the_same_objects_in_python_are(tmp_path) -> None:
    values = [TEXT, {**CHAT, "role": "keep"}, {**TEXT, "name": "sea", "check": None}]
    expected = [to_probe(value) for value in values]
    (path := tmp_path / "probes.jsonl").write_text("\n".join(map(json.dumps, values)))
    assert read_probes(path) == expected
    path.write_text(json.dumps(values, indent=1))
    assert read_probes(str(path)) == expected


def test_a_wrong_line_of_a_file_is_told_with_its_number() -> None:
    lines = [json.dumps(TEXT), '{"prompt": "a"}', '{"context": "a", "continuation": "b"}']
    with pytest.raises(InvalidArgument) as refused:
        read_stream(io.BytesIO("\n".join(lines).encode()), "probes.jsonl", PROBES)
    assert [v.field for v in refused.value.violations] == ["probes.jsonl:2", "probes.jsonl:3"]
    with pytest.raises(InvalidArgument, match=r'holds no probes; .*"prompt"'):
        read_stream(io.BytesIO(b"\n"), "probes.jsonl", PROBES)


NAMED = [pb.Probe(name=name, sample=SAMPLE) for name in "abc"]


def test_the_regression_set_is_listed_by_pages_and_emptied_by_name(connect) -> None:
    with serving(Scripted(probes=NAMED)) as address:
        client = connect(address)
        first = client.call("list_regression_probes", 2)
        rest = client.call("list_regression_probes", page_token=first.next_page_token)
        assert [*first.probes, *rest.probes] == NAMED and not rest.next_page_token
        assert client.call("delete_regression_probes", ["b", "x"]) == 1
        assert [p.name for p in client.call("list_regression_probes").probes] == ["a", "c"]
        assert client.call("delete_regression_probes", None) == 2


def test_no_names_are_not_all_names(connect) -> None:
    scripted = Scripted(probes=NAMED)
    with serving(scripted) as address:
        client = connect(address)
        assert client.call("delete_regression_probes", []) == 0
        assert client.call("delete_regression_probes", iter(())) == 0
        for wrong in ("abc", [3], 3):
            with pytest.raises(InvalidArgument, match="names"):
                client.call("delete_regression_probes", wrong)
    assert scripted.probes == NAMED


def test_without_an_accepted_run_a_model_has_no_regression_set(connect, server) -> None:
    client = connect(server)
    assert not client.call("list_regression_probes").probes
    assert client.call("delete_regression_probes", None) == 0
    with pytest.raises(InvalidArgument, match="page_size"):
        client.call("list_regression_probes", -1)


def test_probes_of_an_accepted_run_stay_with_the_model_until_they_are_deleted(connect, server):
    client = connect(server)
    probe = {**TEXT, "name": "sea", "check": "log_probability", "min_log_probability": -1e6}
    kept = [probe, {**probe, "name": "sun", "role": "keep"}]
    events = client.train([("a", "b")], probes=kept, accept_if=True)
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    probed = [event.probed for event in events if event.HasField("probed")]
    assert [told.after_training for told in probed] == [False, True]
    assert [p.name for p in client.call("list_regression_probes").probes] == ["sea"]
    assert client.call("delete_regression_probes", ["sea", "sun"]) == 1
    assert not client.call("list_regression_probes").probes


def test_a_run_whose_probe_fails_is_rejected_and_its_probe_is_not_kept(connect, server):
    client = connect(server)
    probe = {**TEXT, "check": "log_probability", "min_log_probability": 0}
    *_, last = client.train([("a", "b")], probes=[probe], accept_if={"max_failed": 0})
    assert last.finished.state == pb.RUN_STATE_REJECTED
    assert last.finished.failure.reason and last.finished.failure.message
    assert not client.call("list_regression_probes").probes
