"""A process that runs, sleeps, is stopped, or has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from apollo_grpc.process_state import runs, runs_with_parent


@pytest.fixture
def child():
    code = "import time; print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_one_that_sleeps_runs(child):
    assert runs(child.pid)


def test_one_that_is_stopped_does_not_until_it_goes_on(child):
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    assert not runs(child.pid)
    child.send_signal(signal.SIGCONT)
    os.waitid(os.P_PID, child.pid, os.WCONTINUED)
    assert runs(child.pid)


def test_one_that_ended_does_not_though_nobody_collected_it(child):
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not runs(child.pid)


def test_none_at_all_does_not(child):
    child.kill()
    child.wait()
    assert not runs(child.pid)


def test_a_child_of_a_stopped_process_does_not_run_with_its_parent():
    code = "import subprocess, sys; c = subprocess.Popen(['sleep', '60']); print(c.pid, flush=True)"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"{code}; c.wait()"], stdout=subprocess.PIPE, start_new_session=True
    )
    child = int(parent.stdout.readline())
    try:
        assert runs_with_parent(child)
        parent.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, parent.pid, os.WSTOPPED)
        assert runs(child)
        assert not runs_with_parent(child)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
