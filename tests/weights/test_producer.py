"""Whether the owner of mapped memory is there is asked of the kernel, by a descriptor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from apollo_grpc.errors import FailedPrecondition
from apollo_trainer.weights.producer import Producer

HERE = Path("/proc/self/ns/pid").stat().st_ino


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_a_killed_process_is_known_at_once_though_nobody_collected_it(child):
    producer = Producer(child.pid, HERE)
    assert producer.alive
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not producer.alive


def test_a_stopped_process_still_owns_its_memory(child):
    producer = Producer(child.pid, HERE)
    child.send_signal(signal.SIGSTOP)
    assert producer.alive


def test_a_process_that_ended_before_is_refused(child):
    child.kill()
    child.wait()
    with pytest.raises(FailedPrecondition) as refused:
        Producer(child.pid, HERE)
    assert refused.value.reason == "BUFFER_GONE"


def test_a_pid_of_another_namespace_is_refused(child):
    with pytest.raises(FailedPrecondition, match="--pid") as refused:
        Producer(child.pid, HERE + 1)
    assert refused.value.reason == "ANOTHER_PID_NAMESPACE"


def test_many_threads_may_ask_at_once(child):
    producer, answers = Producer(child.pid, HERE), []
    threads = [
        threading.Thread(target=lambda: answers.extend(producer.alive for _ in range(2000)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 16000


def test_its_descriptor_is_closed_with_it(child):
    before = descriptors()
    producer = Producer(child.pid, HERE)
    assert descriptors() == before + 1
    del producer
    assert descriptors() == before
