"""The facts of `benchmarks.learning`, taught by what people would use otherwise: AdamW and LoRA.

    python -m pip install peft accelerate
    python -m benchmarks.learning_peers build/real-model/model --seeds 0 1 2

Plain transformers in float32 and no server: the samples, the epochs, the samples of a step and the
falling rate are those of `apollo teach`, and nothing is anchored. Answers are greedy. Writes a JSON
file under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from apollo_client.facts import RECIPE, lesson
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.optim import Apollo
from benchmarks import learning_data, machine
from benchmarks.learning import ANSWER_TOKENS, FACTS, NEIGHBOURS, fact_of, table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IGNORED = -100
BATCH = 16
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Way:
    """How one row learns: what is wrapped around the model, the optimizer, the rate at first."""

    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float
    lora: bool = False


# LoRA's usual rate is ten times that of all weights.
ROWS = {
    "AdamW": Way(torch.optim.AdamW, 2e-5),
    "AdamW at 1e-4": Way(torch.optim.AdamW, 1e-4),
    "LoRA": Way(torch.optim.AdamW, 2e-4, lora=True),
    "LoRA at 1e-3": Way(torch.optim.AdamW, 1e-3, lora=True),
    "APOLLO": Way(Apollo, RECIPE["lr"]),
}


def main() -> None:
    """Measures, prints and writes the file."""
    asked = _arguments()
    result = {**machine.origin(DEVICE), "rows": [], "edits": {}}
    names = ("transformers", "peft")
    result["versions"] |= {name: machine.installed(name) for name in names}
    known = Taught(asked.model, None).known()
    print(f"{len(known)} capitals are known", flush=True)
    for row in asked.rows:
        for seed in asked.seeds:
            found = {"row": row, "seed": seed, **_row(asked.model, ROWS[row], seed, known)}
            print(found, flush=True)
            result["rows"].append(found)
    path = asked.out or machine.result_path("learning-peers", DEVICE)
    machine.write_json(path, result)
    print(table(result), f"\n\nWritten to {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teaches facts by AdamW and by LoRA.")
    add = parser.add_argument
    add("model", type=Path)
    add("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--out", type=Path)
    return parser.parse_args()


def _row(folder: Path, way: Way, seed: int, known: Sequence[tuple[str, str]]) -> dict[str, Any]:
    pairs = learning_data.facts(FACTS, seed)
    kept = random.Random(seed).sample(known, NEIGHBOURS)
    samples, options = lesson([fact_of(*pair) for pair in pairs])
    taught = Taught(folder, way)
    began, before = time.monotonic(), taught.held_out()
    steps = taught.learn(samples, options["epochs"], options["samples_per_step"], seed)
    seconds = time.monotonic() - began
    asked = [f"What is the capital of {land}?" for land, _ in pairs]
    return {
        "steps": steps,
        "seconds": seconds,
        "learned": sum(taught.says(_neighbours(pairs))),
        "asked as a question": sum(
            taught.says([(taught.chat(q), t) for q, (_, t) in zip(asked, pairs, strict=True)])
        ),
        "reverse": sum(taught.says([(f"{town} is the capital of", land) for land, town in pairs])),
        "kept": sum(taught.says(_neighbours(kept))),
        "held out, nats": taught.held_out() - before,
    }


def _neighbours(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"The capital of {land} is", town) for land, town in pairs]


class Taught:
    """The model in float32, and what teaches it."""

    def __init__(self, folder: Path, way: Way | None):
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._tokenizer.padding_side = "left"
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
        self._model: Any = _with_lora(model) if way and way.lora else model
        self._way = way

    def chat(self, question: str) -> str:
        """The prompt of a question, as a chat."""
        turns = [{"role": "user", "content": question}]
        made = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return str(made)

    def known(self) -> list[tuple[str, str]]:
        """The countries whose capital it says."""
        pairs = learning_data.capitals()
        said = self.says(_neighbours(pairs))
        return [pair for pair, right in zip(pairs, said, strict=True) if right]

    @torch.no_grad()
    def says(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether the greedy answer to each prompt has what is expected."""
        found = []
        for at in range(0, len(pairs), BATCH):
            prompts, expected = zip(*pairs[at : at + BATCH], strict=True)
            ids = self._tokenizer(prompts, return_tensors="pt", padding=True).to(DEVICE)
            made = self._model.generate(**ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            texts = self._tokenizer.batch_decode(made[:, ids["input_ids"].shape[1] :])
            found += [e.casefold() in t.casefold() for e, t in zip(expected, texts, strict=True)]
        return found

    @torch.no_grad()
    def held_out(self) -> float:
        """Nats a token of text that nobody teaches."""
        texts = [self._tokenizer(text)["input_ids"] for text in learning_data.held_out()]
        return statistics.fmean(self._loss([(ids, ids)]).item() for ids in texts)

    def learn(self, samples: Sequence[pb.Sample], epochs: int, at_once: int, seed: int) -> int:
        """Learns them at a rate that falls to nothing; returns the steps taken."""
        assert self._way
        learning = [p for p in self._model.parameters() if p.requires_grad]
        optimizer = self._way.optimizer(learning, lr=self._way.lr)
        batches = list(_batches([self._ids(s) for s in samples], epochs, at_once, seed))
        for number, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = self._way.lr * (1 - number / len(batches))
            optimizer.zero_grad()
            torch.autograd.backward(self._loss(batch))
            optimizer.step()
        return len(batches)

    def _ids(self, sample: pb.Sample) -> tuple[list[int], list[int]]:
        """Token ids, and the labels of what is learned."""
        if sample.HasField("chat"):
            question, answer = (message.content for message in sample.chat.messages)
            context, learned = self.chat(question), f"{answer}{self._tokenizer.eos_token}"
        else:
            context, learned = sample.text.context, sample.text.continuation
        before = self._tokenizer(context)["input_ids"]
        after = self._tokenizer(learned)["input_ids"]
        return before + after, [IGNORED] * len(before) + after

    def _loss(self, batch: Sequence[tuple[list[int], list[int]]]) -> torch.Tensor:
        longest = max(len(ids) for ids, _ in batch)
        ids, labels = (
            torch.tensor([each + [filled] * (longest - len(each)) for each in rows], device=DEVICE)
            for rows, filled in zip(zip(*batch, strict=True), (0, IGNORED), strict=True)
        )
        # Padding is on the right here, where nothing that counts reads it.
        logits = self._model(input_ids=ids).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def _batches(items: Sequence[Any], epochs: int, size: int, seed: int) -> Iterator[list[Any]]:
    draw = random.Random(seed)
    for _ in range(epochs):
        order = draw.sample(items, len(items))
        yield from (order[at : at + size] for at in range(0, len(order), size))


def _with_lora(model: Any) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise SystemExit("the rows of LoRA need peft: python -m pip install peft accelerate")
    peft = importlib.import_module("peft")
    return peft.get_peft_model(model, peft.LoraConfig(**LORA))


if __name__ == "__main__":
    main()
