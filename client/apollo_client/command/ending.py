"""Why a program that was started here ended by itself: its own last error, and what to do."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator, Sequence

# Of what a program prints; the traceback of one error takes some fifty.
KEPT_LINES = 300
MAX_LINES, MAX_WIDTH = 10, 400
NO_ERROR = "its log names no error"
# What vLLM's logger and its processes put before a line.
_PREFIX = re.compile(r"^(?:\([^()]* pid=\d+\) )?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] )?")
# As Python's tracebacks write it, and argparse; a warning that quotes an error is none.
_ERROR = re.compile(r"^((?:\w+\.)*\w*(?:Error|Exception): .+|MemoryError|\S+\.py: error: .+)$")
# Words for an error that another process told first or tells next.
_QUOTES = (
    "CalledProcessError",
    "Error raised in subprocess",
    "EngineDeadError",
    "Engine core initialization failed",
    "RuntimeError: cancelled",
    "WorkerProc initialization failed",
)
_NOISE = ("For further information visit", "^^^^")
_MEMORY = (
    "Memory ran out, most likely. End what else takes memory, serve a shorter --max-model-len, or "
    "give the KV cache less: VLLM_CPU_KVCACHE_SPACE on a CPU (GiB), --gpu-memory-utilization on a "
    "GPU."
)
# The first that is found in the error's lines.
_ADVICE = (
    (r"KV cache is needed|memory for the cache blocks|maximum number of tokens that can be stored",
     "Give a smaller --max-model-len, or the KV cache more room: VLLM_CPU_KVCACHE_SPACE on a CPU "
     "(GiB), --gpu-memory-utilization on a GPU."),
    (r"[Aa]ddress already in use", "Another program has the port; name another with --port."),
    (r"No space left on device", "A disk, or /dev/shm in a container, is full."),
    (r"out of memory|OutOfMemory|MemoryError|[Cc]annot allocate memory|Available memory on node",
     _MEMORY),
    (r"[Uu]nknown quantization|quantization config|bitsandbytes",
     "Quantised weights cannot be trained: serve the model that they were made from."),
    (r"does not recognize this architecture|are not supported for now|has no vLLM implementation",
     "The vLLM and transformers that are installed do not know this model; newer ones may."),
    (r"trust_remote_code|--trust-remote-code|contains custom code",
     "The model brings code of its own; if you trust it, add --trust-remote-code."),
    (r"No module named '([\w.]+)'|requires? the following packages", "Install what is missing into "
     "the Python environment of 'apollo'."),
    (r"unrecognized arguments|invalid choice|expected one argument",
     "What follows MODEL goes to vLLM: 'vllm serve --help=all' lists its options."),
)  # fmt: skip


def ended(name: str, status: int) -> str:
    """That it did, by a status as subprocesses have it."""
    if status >= 0:
        return f"{name} ended by itself with status {status}"
    return f"{name} was killed by signal {-status} ({signal.Signals(-status).name})"


def why_ended(status: int, lines: Sequence[str]) -> list[str]:
    """Its error's lines, at most ten, and what to do where the cause is known.

    Args:
        lines: the last that it printed.
    """
    said = _error_lines(lines) or [line for line in map(_bare, lines) if line.strip()][-3:]
    return [*(line[:MAX_WIDTH] for line in said), *_advice(status, lines, said)]


def stated_cause(log: str) -> str:
    """The first line of a log that is an error, without what the logger put before it."""
    return next(iter(_error_lines(log.splitlines())), NO_ERROR)


def _error_lines(lines: Iterable[str]) -> list[str]:
    """The first error, and what belongs to it."""
    rest = iter(lines)
    for line in rest:
        if "WARNING" in line or any(quote in line for quote in _QUOTES):
            continue
        if error := _ERROR.match(_bare(line)):
            return [error[1].strip(), *_more(rest)][:MAX_LINES]
    return []


def _more(rest: Iterator[str]) -> Iterator[str]:
    """Lines of the same error: what a logger or a traceback begins is another."""
    for line in map(_bare, rest):
        if not line.startswith((" ", "\t")):
            return
        if not any(noise in line for noise in _NOISE):
            yield line.rstrip()


def _bare(line: str) -> str:
    return line[match.end() :] if (match := _PREFIX.match(line)) else line


def _advice(status: int, lines: Sequence[str], said: Sequence[str]) -> list[str]:
    # vLLM's first process tells of its others by their exit status alone.
    if status == -signal.SIGKILL or any("-9" in l and "Engine" in l for l in lines):  # noqa: E741
        return [_MEMORY]
    text = "\n".join(said)
    return next(([advice] for known, advice in _ADVICE if re.search(known, text)), [])
