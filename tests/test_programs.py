"""What tests start is not taken for what had its process id before."""

from __future__ import annotations

import os
from pathlib import Path

from tests import programs
from tests.waiting import HANG

# The last id that was given out; who may write it has the next one given out again.
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
SLEEP = "import time; time.sleep(60)"


def test_a_program_is_not_the_one_that_ended_with_its_id(tmp_path: Path) -> None:
    server = programs.ForkServer(["json"])

    def start(code: str) -> programs.Program:
        log = tmp_path / "log"
        return server.start("-c", code, env=os.environ, log=log, core=None, before=None)

    for _ in range(100):
        first = start("pass")
        assert first.wait(HANG) == 0
        # Other processes take ids, too, and may keep this one.
        LAST_PID.write_text(str(first.pid - 1))
        second = start(SLEEP)
        if second.pid == first.pid:
            break
        second.kill()
    assert second.pid == first.pid
    assert second.poll() is None
    second.kill()
    assert second.wait(HANG) == -9
    assert first.returncode == 0
