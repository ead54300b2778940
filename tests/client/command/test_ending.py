"""What is told of a program that ended by itself: its own error, from logs as vLLM writes them."""

from __future__ import annotations

import signal

import pytest

from apollo_client.command.ending import ended, why_ended

SERVER, CORE = "(APIServer pid=7) ", "(EngineCore pid=9) ERROR 11-29 11:54:13 [core.py:1510] "
VALIDATION = "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig"
MORE = "    For further information visit https://errors.pydantic.dev/2.14/v/value_error"
FROM_CORE = f"""\
(APIServer pid=7) WARNING 11-29 11:53:09 [system_utils.py:255] This can cause OSError: [Errno 24]
{CORE}EngineCore failed to start.
{CORE}Traceback (most recent call last):
{CORE}  File "/vllm/v1/engine/core.py", line 1500, in run_engine_core
{CORE}    engine_core = EngineCoreProc(*args)
{CORE}ValueError: To serve at least one request with the models's max seq len (8192), 0.18 GiB KV \
cache is needed, which is larger than the available KV cache memory (0.1 GiB).
Process EngineCore:
Traceback (most recent call last):
  File "/multiprocessing/process.py", line 314, in _bootstrap
RuntimeError: Engine core initialization failed. See root cause above.
"""


def told_of(log: str, status: int = 1) -> list[str]:
    return why_ended(status, log.splitlines())


def test_the_error_of_the_process_that_failed_is_told_without_its_traceback() -> None:
    error, advice = told_of(FROM_CORE)
    assert error.startswith("ValueError: To serve at least one request") and "pid=9" not in error
    assert "--max-model-len" in advice and "VLLM_CPU_KVCACHE_SPACE" in advice


@pytest.mark.parametrize(
    ("log", "first", "advice"),
    [
        ("OSError: [Errno 98] Address already in use", "OSError", "--port"),
        ("usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --no",
         "api_server.py: error: unrecognized", "vllm serve --help"),
        (f"{VALIDATION}\n  Value error, Model architectures ['X'] are not supported for now.",
         VALIDATION, "do not know this model"),
        (f"{VALIDATION}\n  Value error, Unknown quantization method: bitsandbytes.",
         VALIDATION, "serve the model that they were made from"),
        (f"{VALIDATION}\n  Value error, The repository m contains custom code",
         VALIDATION, "--trust-remote-code"),
        ("ModuleNotFoundError: No module named 'timm'", "ModuleNotFoundError", "Install"),
        (f"{CORE}ValueError: Available memory on node 0 (2/23 GiB) on kv cache allocation is less",
         "ValueError", "Memory ran out"),
        ("MemoryError", "MemoryError", "Memory ran out"),
        ("OSError: [Errno 28] No space left on device", "OSError", "is full"),
    ],
)  # fmt: skip
def test_a_known_cause_is_told_with_what_to_do(log: str, first: str, advice: str) -> None:
    lines = told_of(f"INFO fine\n{log}\n")
    assert lines[0].startswith(first)
    assert advice in lines[-1] and len(lines) <= 3


def test_an_error_of_several_lines_is_told_whole_but_no_dump_of_it() -> None:
    log = f"{SERVER}{VALIDATION}\n  Value error, {'x' * 900}\n{MORE}\nINFO 11-29 11:53:09 next\n"
    lines = told_of(log)
    assert lines[0] == VALIDATION and lines[1].startswith("  Value error, x")
    assert len(lines) == 2 and max(map(len, lines)) <= 400
    long = "ValueError: first\n" + "  more\n" * 50
    assert len(told_of(long)) == 10


def test_without_an_error_the_last_lines_are_told() -> None:
    log = "one\n\ntwo\nthree\napollo-training-server: APOLLO_RANK is no number\n\n"
    assert told_of(log, 2) == ["two", "three", "apollo-training-server: APOLLO_RANK is no number"]
    assert told_of("") == []


@pytest.mark.parametrize(
    ("status", "log"),
    [
        (-signal.SIGKILL, "INFO all is well"),
        (1, "ERROR 11-29 [x.py:1] Engine core proc EngineCore died: {'EngineCore_0': -9}"),
    ],
)
def test_a_kill_is_told_as_memory_that_ran_out(status: int, log: str) -> None:
    assert "Memory ran out" in told_of(log, status)[-1]


def test_a_signal_is_told_as_such() -> None:
    assert ended("vllm", -9) == "vllm was killed by signal 9 (SIGKILL)"
    assert ended("vllm", -11) == "vllm was killed by signal 11 (SIGSEGV)"
    assert ended("trainer", 2) == "trainer ended by itself with status 2"
