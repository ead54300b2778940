"""Two processes that live and end together, with scripts in the place of the services."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apollo_client.command.children import Child, Children
from tests.waiting import wait_until

SLEEP = "import time; time.sleep(60)"
NOBODY = "unix:/nowhere/training.sock"


def child(name: str, code: str) -> Child:
    return Child(name, [sys.executable, "-u", "-c", code], dict(os.environ))


def run(vllm: str, trainer: str) -> int:
    return asyncio.run(Children(child("vllm", vllm), child("trainer", trainer), NOBODY).run())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("codes", "name"), [(("exit(7)", SLEEP), "vllm"), ((SLEEP, "exit(7)"), "trainer")]
)
def test_the_end_of_one_is_told_and_ends_the_other(codes, name, capfd):
    began = time.monotonic()
    assert run(*codes) == 1
    assert time.monotonic() - began < 30
    assert f"{name} ended by itself with status 7" in capfd.readouterr().out


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
