"""What becomes of samples, and which are refused with the path of the wrong field."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.sidecar.v1 import weight_export_pb2 as export_pb
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.requests.samples import SampleLimits, tokenize_samples
from apollo_trainer.training.samples import TokenizedSample
from examples.byte_model import byte_tokenizer
from tests.plain_prompts import PlainTokens

LIMITS = SampleLimits(vocabulary=259, max_tokens=20, max_samples=4)
WIDE = SampleLimits(vocabulary=259, max_tokens=100_000, max_samples=4)
CONTEXT, CONTINUATION = (
    "spec.samples[0].tokens.context_ids",
    "spec.samples[0].tokens.continuation_ids",
)
MESSAGES = "spec.samples[0].chat.messages"


def of_tokens(context: list[int], continuation: list[int], **fields: Any) -> pb.Sample:
    tokens = pb.TokenSample(context_ids=context, continuation_ids=continuation)
    return pb.Sample(tokens=tokens, **fields)


def of_text(context: str, continuation: str) -> pb.Sample:
    return pb.Sample(text=pb.TextSample(context=context, continuation=continuation))


def of_chat(*turns: tuple[str, str]) -> pb.Sample:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.Sample(chat=pb.ChatSample(messages=messages))


def nobody(samples: Sequence[pb.Sample]) -> NoReturn:
    """Token ids are taken where vLLM is not asked."""
    raise AssertionError(f"asked about {len(samples)} samples")


def refusal(samples: list[pb.Sample], tokenizer: Any = None) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        tokenize_samples(samples, LIMITS, PlainTokens(tokenizer))
    return caught.value


def test_token_ids_are_taken_as_they_are() -> None:
    sample = of_tokens([5, 6], [7, 8, 9], weight=0.5, token_weights=[1, 0, 2])
    assert tokenize_samples([sample], LIMITS, nobody) == [
        TokenizedSample((5, 6), (7, 8, 9), 0.5, (1.0, 0.0, 2.0))
    ]


def test_an_unset_weight_is_one_and_no_token_weights_are_none() -> None:
    assert tokenize_samples([of_tokens([5], [6])], LIMITS, nobody) == [TokenizedSample((5,), (6,))]


def test_text_is_cut_where_the_user_cut_it(tokenizer: Any) -> None:
    (sample,) = tokenize_samples([of_text("2+2=", "4")], LIMITS, PlainTokens(tokenizer))
    assert tokenizer.decode(sample.context_ids) == "2+2="
    assert tokenizer.decode(sample.continuation_ids) == "4"


def test_the_last_assistant_turn_is_learned_with_its_end_mark(tokenizer: Any) -> None:
    chat = of_chat(("user", "hi"), ("assistant", "yo"), ("user", "?"), ("assistant", "ok"))
    (sample,) = tokenize_samples([chat], LIMITS, PlainTokens(tokenizer))
    assert tokenizer.decode(sample.continuation_ids) == "ok<|end|>"
    assert tokenizer.decode(sample.context_ids) == (
        "<|user|>hi<|end|><|assistant|>yo<|end|><|user|>?<|end|><|assistant|>"
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    context=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
    continuation=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
)
def test_any_text_comes_back_from_its_ids(tokenizer: Any, context: str, continuation: str) -> None:
    (sample,) = tokenize_samples([of_text(context, continuation)], WIDE, PlainTokens(tokenizer))
    assert tokenizer.decode(sample.context_ids, clean_up_tokenization_spaces=False) == context
    assert (
        tokenizer.decode(sample.continuation_ids, clean_up_tokenization_spaces=False)
        == continuation
    )


@pytest.mark.parametrize(
    ("sample", "path", "says"),
    [
        (pb.Sample(), "spec.samples[0]", "needs one of tokens, text and chat"),
        (of_tokens([1], []), CONTINUATION, "nothing to learn"),
        (of_tokens([], [1]), CONTEXT, "needs one before it"),
        (of_tokens([1, 259], [1]), f"{CONTEXT}[1]", "vocabulary of 259"),
        (of_tokens([1], [1, 2, -1]), f"{CONTINUATION}[2]", "token id -1"),
        (of_tokens([1] * 11, [1] * 10), "spec.samples[0].tokens", "21 tokens"),
        (of_tokens([1], [1], weight=-1), "spec.samples[0].weight", "from 0 to"),
        (of_tokens([1], [1], weight=math.nan), "spec.samples[0].weight", "from 0 to"),
        (of_tokens([1], [1], weight=1e300), "spec.samples[0].weight", "from 0 to"),
        (of_tokens([1], [1], weight=math.inf), "spec.samples[0].weight", "from 0 to"),
        (of_tokens([1], [1], weight=0), "spec.samples[0].weight", "nothing to learn"),
        (
            of_tokens([1], [1, 2], token_weights=[1]),
            "spec.samples[0].token_weights",
            "1 entries for 2 continuation tokens",
        ),
        (
            of_tokens([1], [1], token_weights=[math.nan]),
            "spec.samples[0].token_weights",
            "from 0 to",
        ),
        (
            of_tokens([1], [1, 2], token_weights=[1, -1]),
            "spec.samples[0].token_weights",
            "from 0 to",
        ),
        (
            of_tokens([1], [1], weight=1e-200, token_weights=[1e-200]),
            "spec.samples[0].token_weights",
            "nothing to learn",
        ),
        (
            of_tokens([1], [1, 2], token_weights=[0, 0]),
            "spec.samples[0].token_weights",
            "nothing to learn",
        ),
        (of_text("a", ""), "spec.samples[0].text.continuation", "nothing to learn"),
        (of_text("", "a"), "spec.samples[0].text.context", "needs one before it"),
        (of_text("a" * 20, "b"), "spec.samples[0].text", "21 tokens"),
        (of_chat(), MESSAGES, "must end with an assistant message"),
        (of_chat(("assistant", "a"), ("user", "b")), MESSAGES, "must end with an assistant"),
        (of_chat(("assistant", "a")), MESSAGES, "needs a message before"),
        (of_chat(("user", "a"), ("assistant", "")), f"{MESSAGES}[1].content", "nothing to learn"),
    ],
)
def test_a_wrong_sample_is_refused_at_its_field(
    tokenizer: Any, sample: pb.Sample, path: str, says: str
) -> None:
    error = refusal([sample], tokenizer)
    assert [violation.field for violation in error.violations] == [path]
    assert says in error.violations[0].description
    assert path in error.message


@pytest.mark.parametrize(
    ("sample", "kind"),
    [(of_text("a", "b"), "text"), (of_chat(("user", "a"), ("assistant", "b")), "chat")],
)
def test_without_a_tokenizer_only_token_ids_are_taken(sample: pb.Sample, kind: str) -> None:
    error = refusal([sample])
    assert error.violations[0].field == f"spec.samples[0].{kind}"
    assert "send tokens" in error.message


def test_without_a_chat_template_a_chat_is_refused() -> None:
    bare = byte_tokenizer()
    bare.chat_template = None
    error = refusal([of_chat(("user", "a"), ("assistant", "b"))], bare)
    assert error.violations[0].field == "spec.samples[0].chat"


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    rewriting = byte_tokenizer()
    rewriting.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    error = refusal([of_chat(("user", "a"), ("assistant", "b"))], rewriting)
    assert error.violations[0].field == MESSAGES
    assert "differently" in error.message


def test_what_a_template_writes_after_the_end_mark_is_not_learned() -> None:
    chatml = byte_tokenizer()
    chatml.chat_template = (
        "{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
    )
    chat = of_chat(("user", "hi"), ("assistant", "ok"))
    (sample,) = tokenize_samples([chat], WIDE, PlainTokens(chatml))
    assert chatml.decode(sample.context_ids) == "<|user|>user\nhi<|end|>\n<|user|>assistant\n"
    assert chatml.decode(sample.continuation_ids) == "ok<|end|>"


def test_an_answer_whose_first_token_would_melt_into_the_prompt_is_read_by_itself() -> None:
    """The model generates after the prompt's own tokens, whatever both would be together."""
    merging = byte_tokenizer()
    model = json.loads(merging.backend_tokenizer.to_str())
    model["model"]["merges"] = [["Ċ", "Ċ"]]  # how bytes are written: two line ends
    model["model"]["vocab"]["ĊĊ"] = 300
    backend = Tokenizer.from_str(json.dumps(model))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    )
    limits = SampleLimits(vocabulary=400, max_tokens=100, max_samples=4)
    chat = of_chat(("user", "a"), ("assistant", "\nb"))
    (sample,) = tokenize_samples([chat], limits, PlainTokens(fast))
    assert 300 in fast("\n\n")["input_ids"]
    assert fast.decode(sample.context_ids).endswith("assistant:\n")
    assert fast.decode(sample.continuation_ids) == "\nb<|end|>"


def test_the_context_begins_as_a_prompt_of_vllm_does_and_the_continuation_does_not() -> None:
    with_bos = byte_tokenizer()
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", 1)]
    )
    (sample,) = tokenize_samples([of_text("ab", "c")], LIMITS, PlainTokens(with_bos))
    assert sample.context_ids == (1, *byte_tokenizer()("ab")["input_ids"])
    assert sample.continuation_ids == tuple(byte_tokenizer()("c")["input_ids"])
    (sample,) = tokenize_samples([of_text("", "c")], LIMITS, PlainTokens(with_bos))
    assert sample.context_ids == (1,)
    (sample,) = tokenize_samples(
        [of_chat(("user", "a"), ("assistant", "b"))], LIMITS, PlainTokens(with_bos)
    )
    assert with_bos.decode(sample.context_ids) == "<|user|>a<|end|><|assistant|>"


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a space before every text, as those of Llama 2 do; knows 'ab' as one token."""
    vocabulary = {symbol: index for index, symbol in enumerate("▁abcdefgh")} | {"ab": 9}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(("context", "continuation"), [("c", "de"), ("c d", " e"), ("ab", "c")])
def test_no_space_is_learned_that_was_not_written(context: str, continuation: str) -> None:
    spaced = spaced_tokenizer()
    (sample,) = tokenize_samples([of_text(context, continuation)], LIMITS, PlainTokens(spaced))
    together = [*sample.context_ids, *sample.continuation_ids]
    assert spaced.decode(together) == context + continuation


def test_a_cut_inside_a_token_is_refused_where_it_would_learn_a_space() -> None:
    error = refusal([of_text("a", "b")], spaced_tokenizer())
    assert error.violations[0].field == "spec.samples[0].text.continuation"
    assert "Cut between words" in error.message


def test_no_samples_and_too_many_are_refused() -> None:
    assert refusal([]).violations[0].field == "spec.samples"
    error = refusal([of_tokens([1], [1])] * 5)
    assert error.violations[0].field == "spec.samples"
    assert "at most 4" in error.message


def test_every_wrong_sample_is_named_and_the_good_ones_are_not() -> None:
    samples = [of_tokens([], [1]), of_tokens([1], [1]), of_tokens([1], [])]
    error = refusal(samples)
    assert [v.field for v in error.violations] == [
        "spec.samples[0].tokens.context_ids",
        "spec.samples[2].tokens.continuation_ids",
    ]
    assert error.reason == "SAMPLE_INVALID"


def test_a_flood_of_wrong_samples_is_cut_at_twenty() -> None:
    limits = SampleLimits(vocabulary=259, max_tokens=20, max_samples=100)
    with pytest.raises(InvalidArgument) as caught:
        tokenize_samples([of_tokens([1], [])] * 50, limits, nobody)
    assert len(caught.value.violations) == 20


class Asked(PlainTokens):
    """Keeps how many samples it was asked about at once."""

    counts: list[int]

    def __call__(self, samples: Sequence[pb.Sample]) -> Any:
        self.counts.append(len(samples))
        return super().__call__(samples)


def test_vllm_is_asked_about_some_samples_at_once_and_not_about_token_ids(tokenizer: Any) -> None:
    limits = SampleLimits(vocabulary=259, max_tokens=20, max_samples=1000)
    mixed = [
        sample for n in range(300) for sample in (of_text("a", f"{n}"), of_tokens([1], [n % 9]))
    ]
    asked = Asked(tokenizer)
    asked.counts = []
    found = tokenize_samples(mixed, limits, asked)
    assert asked.counts == [128, 128, 44]
    assert [tokenizer.decode(each.continuation_ids) for each in found[::2]] == [
        str(n) for n in range(300)
    ]
    assert [each.continuation_ids for each in found[1::2]] == [(n % 9,) for n in range(300)]


def test_large_samples_are_sent_one_by_one() -> None:
    counts: list[int] = []

    def refuse(samples: Sequence[pb.Sample]) -> list[export_pb.TokenizedSample]:
        counts.append(len(samples))
        return [export_pb.TokenizedSample(field="text", refusal="is long") for _ in samples]

    with pytest.raises(InvalidArgument) as caught:
        tokenize_samples([of_text("a" * 2**20, "b")] * 2, LIMITS, refuse)
    assert counts == [1, 1]
    assert [each.field for each in caught.value.violations] == [
        "spec.samples[0].text",
        "spec.samples[1].text",
    ]
