"""Two processes that live and end together, with scripts in the place of the services."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import apollo_client.command.children as children_module
from apollo_client.command.children import Child, Children
from tests.waiting import alive, wait_until

SLEEP = "import time; time.sleep(60)"
NOBODY = "unix:/nowhere/training.sock"


def child(name: str, code: str) -> Child:
    return Child(name, [sys.executable, "-u", "-c", code], dict(os.environ))


def run(vllm: str, trainer: str) -> int:
    return asyncio.run(Children(child("vllm", vllm), child("trainer", trainer), NOBODY).run())


@pytest.mark.parametrize(
    ("codes", "name"), [(("exit(7)", SLEEP), "vllm"), ((SLEEP, "exit(7)"), "trainer")]
)
def test_the_end_of_one_is_told_and_ends_the_other(codes, name, capfd):
    began = time.monotonic()
    assert run(*codes) == 1
    assert time.monotonic() - began < 30
    assert f"{name} ended by itself with status 7" in capfd.readouterr().out


def told_by_apollo(output: str) -> list[str]:
    lines = [line for line in output.splitlines() if line.startswith("apollo  | ")]
    return [line.removeprefix("apollo  | ") for line in lines]


def test_the_last_words_of_what_ended_are_told_after_both_logs(capfd):
    log = "print('fine'); print('Traceback:'); print('ValueError: no such layer'); exit(1)"
    assert run(log, SLEEP) == 1
    told = told_by_apollo(capfd.readouterr().out)
    assert told == [
        "vllm ended by itself with status 1; stopping both",
        "stopped",
        "vllm ended by itself with status 1:",
        "  ValueError: no such layer",
    ]


def test_a_killed_child_is_told_with_its_signal_and_what_it_means(capfd):
    assert run("import os; os.kill(os.getpid(), 9)", SLEEP) == 1
    told = told_by_apollo(capfd.readouterr().out)
    assert told[0] == "vllm was killed by signal 9 (SIGKILL); stopping both"
    assert "Memory ran out" in told[-1]


def test_a_training_server_that_nobody_reaches_ends_both_and_says_where(capfd):
    children = Children(child("vllm", SLEEP), child("trainer", SLEEP), NOBODY, answer_seconds=0.1)
    assert asyncio.run(children.run()) == 1
    told = told_by_apollo(capfd.readouterr().out)
    assert "does not answer" in told[0] and NOBODY in told[0]
    assert told[-1] == "stopped"


def test_what_is_waited_for_is_told_every_so_often(capfd, monkeypatch):
    monkeypatch.setattr(children_module, "TELL_SECONDS", 0.1)
    children = Children(child("vllm", SLEEP), child("trainer", SLEEP), NOBODY, answer_seconds=1.5)
    assert asyncio.run(children.run()) == 1
    waits = [t for t in told_by_apollo(capfd.readouterr().out) if t.startswith("still waiting")]
    assert waits and all(NOBODY in line for line in waits)


@pytest.mark.parametrize("stubborn", [True, False])
def test_who_has_to_be_killed_is_told_of_before(monkeypatch, tmp_path, stubborn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(children_module, "STOP_SECONDS", 0.5 if stubborn else 60.0)
    ignoring = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on');"
    # vLLM ends once the other surely ignores the signal.
    ready = f"{ignoring if stubborn else ''} open('ready', 'w'); {SLEEP}"
    waiting = "import os, time\nwhile not os.path.exists('ready'): time.sleep(0.01)\nexit(3)"
    told = list[int]()

    def tell(process: int) -> None:
        os.kill(process, 0)
        told.append(process)

    trainer = replace(child("trainer", ready), before_kill=tell)
    asyncio.run(Children(child("vllm", waiting), trainer, NOBODY).run())
    assert len(told) == stubborn


def test_notes_come_before_any_log(capfd):
    children = Children(child("vllm", "exit(3)"), child("trainer", SLEEP), NOBODY, notes=["note"])
    asyncio.run(children.run())
    assert capfd.readouterr().out.startswith("apollo  | note\n")


def test_each_line_has_its_name_also_after_one_that_is_too_long(capfd):
    code = "print('one'); print('x' * 3_000_000); print('bar\\rlast'); exit(3)"
    assert run(code, SLEEP) == 1
    lines = capfd.readouterr().out.splitlines()
    assert "vllm    | one" in lines and "vllm    | last" in lines
    assert all(line.startswith(("vllm    |", "apollo  |")) for line in lines)


def test_the_training_server_is_ended_before_vllm(tmp_path):
    told = tmp_path / "told"
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep({delay}); open({told!r}, 'a').write({name!r}); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "open({told!r} + {name!r}, 'w').close()\n"
        "time.sleep(60)\n"
    )
    vllm = code.format(delay=0, told=str(told), name="V")
    trainer = code.format(delay=0.5, told=str(told), name="T")

    async def interrupted() -> int:
        running = asyncio.create_task(
            Children(child("vllm", vllm), child("trainer", trainer), NOBODY).run()
        )
        while not all(Path(f"{told}{name}").exists() for name in "VT"):
            await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        return await running

    assert asyncio.run(interrupted()) == 0
    assert told.read_text() == "TV"


def test_a_child_runs_on_its_cores_only(capfd):
    core = max(os.sched_getaffinity(0))
    code = "import os; print(os.sched_getaffinity(0)); exit(1)"
    pinned = Child("vllm", [sys.executable, "-c", code], dict(os.environ), cores=[core])
    asyncio.run(Children(pinned, child("trainer", SLEEP), NOBODY).run())
    assert f"vllm    | {{{core}}}" in capfd.readouterr().out


def test_a_killed_command_leaves_no_child_behind(tmp_path):
    code = (
        "import asyncio, os, sys\n"
        "from apollo_client.command.children import Child, Children\n"
        'script = \'import os, sys, time; open(sys.argv[1], "w").write(str(os.getpid())); '
        "time.sleep(60)'\n"
        "def child(name):\n"
        f"    return Child(name, [sys.executable, '-c', script, {str(tmp_path)!r} + '/' + name],"
        " dict(os.environ))\n"
        f"asyncio.run(Children(child('vllm'), child('trainer'), {NOBODY!r}).run())\n"
    )
    files = [tmp_path / "vllm", tmp_path / "trainer"]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as command:
        wait_until(lambda: all(f.exists() and f.read_text() for f in files), "both children")
        pids = [int(file.read_text()) for file in files]
        command.kill()
    wait_until(lambda: not any(alive(pid) for pid in pids), "the end of both children")
