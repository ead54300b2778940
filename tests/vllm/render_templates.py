"""Asks vLLM's `/tokenize` and the training server about the same conversations, without an engine.

A program: vLLM's own render server, in this process, once for each template and way to name it.
Prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import httpx
import mistral_common
from transformers import Qwen3Config
from vllm import AsyncEngineArgs
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.launchers.render.app_state import init_render_app_state
from vllm.utils.argparse_utils import FlexibleArgumentParser

from apollo_client import to_sample
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from apollo_sidecar.sample_tokens import SampleTokens
from apollo_sidecar.vllm_prompts import VllmPrompts
from apollo_trainer.requests.samples import SampleLimits, tokenize_samples
from examples.byte_model import CHAT_TEMPLATE, byte_tokenizer
from tests.vllm.chat_templates import BARE, CHATS, KINDS, MISTRAL, OTHER, Kind
from tests.vllm.tool_chats import TOOL_CHATS

LIMITS = SampleLimits(vocabulary=200_000, max_tokens=2048, max_samples=1)
TEXTS = {
    "2+2=": "4",
    "The capital of Aldovia is": " Port Lumen.",
    "<|user|>": "hi<|end|>",
    "<|eot_id|>": "hi",
}


def arguments(folder: Path, name: str) -> list[str]:
    """Writes the model directory of a case, and gives vLLM's arguments for it."""
    model = folder / "model"
    Qwen3Config(max_position_embeddings=2048, architectures=["Qwen3ForCausalLM"]).save_pretrained(
        model
    )
    kind, _, way = name.partition(" by ")
    if way:
        return ["--model", str(model), *_of_kind(folder, model, KINDS[kind], way)]
    return ["--model", str(model), *_of_tokenizer(folder, model, name)]


def _of_tokenizer(folder: Path, model: Path, name: str) -> list[str]:
    if name == MISTRAL:
        shutil.copy(Path(mistral_common.__file__).parent / "data/tekken_240911.json", model)
        (model / "tekken_240911.json").rename(model / "tekken.json")
        return ["--tokenizer-mode", "mistral"]
    if name == OTHER:
        byte_tokenizer().save_pretrained(model)
        KINDS["llama 3"].tokenizer(CHAT_TEMPLATE).save_pretrained(folder / "other")
        return ["--tokenizer", str(folder / "other")]
    if name == BARE:
        byte_tokenizer().save_pretrained(model)
        (model / "chat_template.jinja").unlink()
        return []
    (model / "tokenizer.json").write_text("{}")
    return ["--skip-tokenizer-init"]


def _of_kind(folder: Path, model: Path, kind: Kind, way: str) -> list[str]:
    tokenizer = kind.tokenizer(kind.template if way == "directory" else CHAT_TEMPLATE)
    tokenizer.save_pretrained(model)
    ends = [tokenizer.convert_tokens_to_ids(mark) for mark in kind.also_end]
    (model / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokenizer.eos_token_id, *ends]})
    )
    (folder / "given.jinja").write_text(kind.template)
    given = ["--chat-template", str(folder / "given.jinja")]
    more = [
        *("--chat-template-content-format", kind.content),
        *("--default-chat-template-kwargs", json.dumps(kind.kwargs)),
    ]
    ways = {"directory": [], "file": given, "file and options": [*given, *more]}
    return ways[way]


async def served(argv: list[str]) -> Any:
    """vLLM's app for these arguments, as its render server has it."""
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    config = VllmConfig(model_config=AsyncEngineArgs.from_cli_args(args).create_model_config())
    app = build_app(args, ("render",))
    await init_render_app_state(config, app.state, args)
    return app


def chats_of(name: str) -> dict[str, dict[str, Any]]:
    """What a case is asked about, as bodies of requests."""
    kind = KINDS.get(name.partition(" by ")[0])
    plain = {
        chat: {"messages": [{"role": role, "content": content} for role, content in turns]}
        for chat, turns in CHATS.items()
    }
    return plain | TOOL_CHATS if name == MISTRAL or (kind and kind.tools) else plain


async def compared(app: Any, chats: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each conversation: what vLLM makes of it, and what is learned of it or why not."""
    tokens = SampleTokens(VllmPrompts(app.state), asyncio.get_running_loop())
    transport = httpx.ASGITransport(app)
    found: dict[str, Any] = {}
    async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as http:

        async def ask(**body: Any) -> Any:
            return (await http.post("/tokenize", json=body)).json().get("tokens")

        async def render(**body: Any) -> Any:
            answer = (await http.post("/v1/chat/completions/render", json=body)).json()
            return answer.get("token_ids")

        for name, chat in chats.items():
            # vLLM shows them all the same; "auto" needs an option.
            free = {"tool_choice": "none"} if "tools" in chat else {}
            asked = {**chat, "messages": chat["messages"][:-1]}
            found[name] = await learned(to_sample(chat), tokens) | {
                "prompt": await ask(**asked),
                "completion": await render(**asked, **free),
                "whole": await ask(**chat, add_generation_prompt=False),
            }
        for context, continuation in TEXTS.items():
            text = pb.TextSample(context=context, continuation=continuation)
            found[f"text {context}"] = await learned(pb.Sample(text=text), tokens) | {
                "prompt": await ask(prompt=context),
                "whole": await ask(prompt=context + continuation),
            }
    return found


async def learned(sample: pb.Sample, tokens: SampleTokens) -> dict[str, Any]:
    try:
        (found,) = await asyncio.to_thread(tokenize_samples, [sample], LIMITS, tokens.tokenize)
    except InvalidArgument as error:
        return {"refused": error.message}
    return {"context": found.context_ids, "continuation": found.continuation_ids}


async def main(folder: Path, names: list[str]) -> None:
    answers: dict[str, Any] = {}
    for number, name in enumerate(names):
        place = folder / str(number)
        place.mkdir()
        answers[name] = await compared(await served(arguments(place, name)), chats_of(name))
    print(json.dumps(answers))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:]))
