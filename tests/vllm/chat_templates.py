"""Chat templates of the kinds that models ship, each written for these tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from examples.byte_model import byte_tokenizer

# Of the conversations in `CHATS`, those that a kind of template refuses.
SYSTEM = frozenset({"system", "parts of all"})
ORDER = frozenset({"two users"})
EVERY = frozenset({"plain", "system", "turns", "reasoning", "marks", "parts of all", "two users"})

# Cases of another tokenizer than the served directory's.
MISTRAL, OTHER = "a tokenizer of Mistral's own", "a tokenizer of another folder"
BARE, NONE = "no template", "no tokenizer"
# It thinks and calls as Qwen 3 and Hermes do.
TOOLED = "qwen 3 with tools"
TOKENIZERS = (MISTRAL, OTHER, BARE, NONE)

CHATS: dict[str, list[tuple[str, str]]] = {
    "plain": [("user", "Where?"), ("assistant", "Port Lumen.")],
    "system": [("system", "Be brief."), ("user", "Where?"), ("assistant", "Port Lumen.")],
    "turns": [
        ("user", "Where?"),
        ("assistant", "Port Lumen."),
        ("user", "Who?"),
        ("assistant", "Ines Harrow."),
    ],
    "reasoning": [
        ("user", "Where?"),
        ("assistant", "<think>\nNot inland.\n</think>\n\nPort Lumen."),
        ("user", "Who?"),
        ("assistant", "Ines Harrow."),
    ],
    "marks": [("user", "What is <|assistant|>?"), ("assistant", " A mark: <|user|>, I say")],
    "parts of all": [
        ("system", "Be brief."),
        ("user", " Où? 東京? "),
        ("assistant", "Là.\n\nOui."),
        ("user", "Who?"),
        ("assistant", " Ines\n"),
    ],
    "two users": [("user", "Where?"), ("user", "Well?"), ("assistant", "Port Lumen.")],
}


@dataclass(frozen=True)
class Kind:
    """A template, and the tokenizer that it is for.

    Attributes:
        marks: special tokens beside the byte tokenizer's; the first one ends an answer.
        bos: begins every prompt of a text.
        also_end: marks that the generation config ends an answer with.
        kwargs: of `--default-chat-template-kwargs`.
        content: of `--chat-template-content-format`.
        ends: whether it writes one of these marks after an answer.
        refused: conversations of which nothing can be learned.
        tools: whether it shows these, and calls of them.
    """

    template: str
    marks: tuple[str, ...] = ("<|end|>",)
    bos: str = ""
    also_end: tuple[str, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    content: str = "string"
    ends: bool = True
    refused: frozenset[str] = frozenset()
    tools: bool = False

    def end_ids(self) -> set[int]:
        """The tokens that end an answer."""
        ids = self.tokenizer("").convert_tokens_to_ids([self.marks[0], *self.also_end])
        return set(ids)

    def tokenizer(self, template: str) -> Any:
        """A byte tokenizer with the marks, and this template or another."""
        made = byte_tokenizer()
        marks = [*self.marks, *self.also_end, *filter(None, [self.bos])]
        made.add_special_tokens({"additional_special_tokens": marks})
        made.eos_token = self.marks[0]
        if self.bos:
            made.bos_token = self.bos
        made.chat_template = template
        return made


_IM = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
)
_HEADER = "'<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
_THINK = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m.content %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% set why = '' %}"
    "{% if '</think>' in text %}"
    "{% set why = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + why + '\n</think>\n\n' }}{% endif %}"
    "{% endif %}{{ text + '<|im_end|>\n' }}{% endfor %}"
)
_PARTS = (
    "{% for m in messages %}{{ '[' + m.role + ']' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
_IM_MARKS = ("<|im_end|>", "<|im_start|>")

KINDS: dict[str, Kind] = {
    "chatml": Kind(_IM, _IM_MARKS),
    "chatml with a system prompt of its own": Kind(
        "{% if messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\n' + (persona or 'You help.') + '<|im_end|>\n' }}{% endif %}" + _IM,
        _IM_MARKS,
        kwargs={"persona": "You are a lighthouse."},
    ),
    "llama 2": Kind(
        "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + "
        "'\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}{% else %}{% set sys = '' %}"
        "{% set turns = messages %}{% endif %}"
        + _ALTERNATE.replace("in messages", "in turns")
        + "{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (sys if loop.first else '') + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("</s>",),
        "<s>",
        refused=ORDER,
    ),
    "llama 3": Kind(
        "{{ bos_token }}{% for m in messages %}{{ " + _HEADER + " + m.content | trim + "
        "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|begin_of_text|>",
        also_end=("<|eot_id|>", "<|eom_id|>"),
    ),
    "llama 3 with a date": Kind(
        "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + "
        "(date_string or 'unknown') + '\n\n' }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
        "{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}"
        "{% for m in messages %}{{ " + _HEADER + " + m.content + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|begin_of_text|>",
        kwargs={"date_string": "1 May 2026"},
    ),
    "gemma": Kind(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        + _ALTERNATE
        + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
        "m.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<eos>", "<start_of_turn>"),
        "<bos>",
        also_end=("<end_of_turn>",),
        refused=SYSTEM | ORDER,
    ),
    "gemma with parts": Kind(
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}"
        "{% for item in m['content'] %}{{ item['text'] | trim }}{% endfor %}{% endif %}"
        "{{ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<eos>", "<start_of_turn>"),
        "<bos>",
        also_end=("<end_of_turn>",),
        content="openai",
    ),
    "mistral": Kind(
        "{{ bos_token }}"
        + _ALTERNATE
        + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
        "{% endfor %}",
        ("</s>", "[INST]", "[/INST]"),
        "<s>",
        refused=SYSTEM | ORDER,
    ),
    "phi 3": Kind(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|endoftext|>", "<|system|>"),
        also_end=("<|end|>",),
    ),
    "phi 4": Kind(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + "
        "'<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        ("<|im_end|>", "<|im_start|>", "<|im_sep|>"),
    ),
    "zephyr": Kind(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        "{% endfor %}",
        ("</s>",),
        "<s>",
    ),
    "deepseek": Kind(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}{{ '<\uff5cUser\uff5c>' + m.content }}"
        "{% else %}{{ '<\uff5cAssistant\uff5c>' + m.content + '<\uff5cend\uff5c>' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c>' }}{% endif %}",
        ("<\uff5cend\uff5c>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
        "<\uff5cbegin\uff5c>",
    ),
    # Its prompt has the model think first; an answer without a thought is none of its answers.
    "deepseek that thinks": Kind(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '<\uff5cUser\uff5c>' + m.content }}{% else %}"
        "{{ '<\uff5cAssistant\uff5c>' + m.content.split('</think>')[-1] + '<\uff5cend\uff5c>' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<\uff5cAssistant\uff5c><think>\n' }}{% endif %}",
        ("<\uff5cend\uff5c>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
        "<\uff5cbegin\uff5c>",
        refused=EVERY,
    ),
    "qwen 3": Kind(
        _THINK + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
        _IM_MARKS,
        kwargs={"enable_thinking": False},
    ),
    "qwen 3 that may think": Kind(
        _THINK + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        _IM_MARKS,
    ),
    TOOLED: Kind(
        "{% if tools %}{{ '<|im_start|>system\n<tools>' }}{% for tool in tools %}"
        "{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content %}"
        "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}"
        '{{ \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
        "{{ call.function.arguments | tojson + '}\n</tool_call>' }}{% endfor %}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        _IM_MARKS,
        tools=True,
    ),
    "parts alone": Kind(_PARTS, content="openai"),
    "parts and marks": Kind(
        "{{ bos_token }}" + _PARTS, ("<|end|>", "<|image|>"), "<s>", content="openai"
    ),
    "no generation prompt": Kind(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>\n' }}{% endfor %}",
    ),
    "no end": Kind(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        ends=False,
    ),
    "tools and documents": Kind(
        "{% if tools %}{{ '<tools>' + tools | tojson + '</tools>' }}{% endif %}"
        "{% if documents %}{{ documents | tojson }}{% endif %}"
        "{% if notes is defined %}{{ '<|user|>' + notes + '<|end|>' }}{% endif %}"
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        kwargs={"notes": "Tides at noon."},
    ),
    # It tells how long the conversation is, and so begins otherwise once it is answered.
    "counting": Kind(
        "{{ messages | length }}{% for m in messages %}{{ m.content + '<|end|>' }}{% endfor %}",
        refused=EVERY,
    ),
    "drops answers": Kind(
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        refused=EVERY,
    ),
}
