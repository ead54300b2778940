"""The MPS daemon of `apollo up`, by a program in the place of NVIDIA's."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from apollo_client.command import gpu_sharing
from apollo_client.command.gpu_sharing import CONTROL, GpuSharing, shared_gpu
from apollo_grpc.errors import FailedPrecondition
from tests.waiting import alive, wait_until

# As the control program does: -f serves in the foreground, and `quit` on its input ends that one.
DAEMON = """\
#!{python}
import os, pathlib, signal, sys
pipe = pathlib.Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
if sys.argv[1:] == ["-f"]:
    (pipe / "pid").write_text(str(os.getpid()))
    {daemon}
    (pipe / "control").touch()
    signal.pause()
asked = sys.stdin.read()
if asked == "get_server_list\\n":
    print(11, 12, sep="\\n")
elif asked.startswith("terminate_client "):
    with (pipe / "terminated").open("a") as file:
        file.write(asked)
else:
    assert asked == "quit\\n"
    os.kill(int((pipe / "pid").read_text()), signal.SIGTERM)
"""


@pytest.fixture
def control(tmp_path, monkeypatch):
    """Puts the program on the path; says what its daemon does before it serves."""

    def make(daemon: str = "pass") -> None:
        program = tmp_path / "bin" / CONTROL
        program.parent.mkdir()
        program.write_text(DAEMON.format(python=sys.executable, daemon=daemon))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(gpu_sharing, "engine_on_cpu", lambda: False)

    return make


def test_both_meet_at_the_daemon_and_the_trainer_goes_behind(control, tmp_path):
    control()
    with shared_gpu(GpuSharing.MPS, tmp_path / "state") as shared:
        pipe = Path(shared.both["CUDA_MPS_PIPE_DIRECTORY"])
        daemon = int((pipe / "pid").read_text())
        assert alive(daemon)
        assert shared.trainer == {"CUDA_MPS_CLIENT_PRIORITY": "1"}
        assert "behind vLLM" in shared.notes[0]
        folders = [pipe, Path(shared.both["CUDA_MPS_LOG_DIRECTORY"])]
        assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700] * 2
    assert not alive(daemon)


def test_who_has_to_be_killed_is_taken_off_the_gpu_before(control, tmp_path):
    control()
    with shared_gpu(GpuSharing.MPS, tmp_path / "state") as shared:
        shared.before_kill(4321)
        told = (Path(shared.both["CUDA_MPS_PIPE_DIRECTORY"]) / "terminated").read_text()
    assert told.splitlines() == ["terminate_client 11 4321", "terminate_client 12 4321"]


@pytest.mark.parametrize("asked", [GpuSharing.AUTO, GpuSharing.TIME])
def test_by_turns_nothing_is_started(control, tmp_path, asked):
    control("(pipe / 'started').touch()")
    with shared_gpu(asked, tmp_path / "state") as shared:
        assert (shared.both, shared.trainer, shared.notes) == ({}, {}, ())
    assert not (tmp_path / "state").exists()


def test_a_machine_without_mps_is_told_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(FailedPrecondition, match="--gpu-sharing time needs neither") as raised,
        shared_gpu(GpuSharing.MPS, tmp_path / "state"),
    ):
        pass
    assert raised.value.reason == "MPS_NOT_FOUND"


def test_a_daemon_that_does_not_start_is_told_with_its_log(control, tmp_path):
    control("sys.exit(3)")
    with (
        pytest.raises(FailedPrecondition, match=r"its log is in .*/log") as raised,
        shared_gpu(GpuSharing.MPS, tmp_path / "state"),
    ):
        pass
    assert raised.value.reason == "MPS_NOT_STARTED"


def test_a_daemon_that_does_not_quit_is_killed(control, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_sharing, "STOP_SECONDS", 0.5)
    control("signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    with shared_gpu(GpuSharing.MPS, tmp_path / "state") as shared:
        daemon = int((Path(shared.both["CUDA_MPS_PIPE_DIRECTORY"]) / "pid").read_text())
    assert not alive(daemon)


def test_the_daemon_ends_with_a_killed_command(control, tmp_path):
    control()
    code = f"""
        import pathlib, signal
        from apollo_client.command import gpu_sharing
        gpu_sharing.engine_on_cpu = lambda: False
        folder = pathlib.Path({str(tmp_path / "state")!r})
        with gpu_sharing.shared_gpu(gpu_sharing.GpuSharing.MPS, folder) as shared:
            print(shared.both["CUDA_MPS_PIPE_DIRECTORY"], flush=True)
            signal.pause()
    """
    command = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert command.stdout
    daemon = int((Path(command.stdout.readline().strip()) / "pid").read_text())
    command.send_signal(signal.SIGKILL)
    command.wait()
    wait_until(lambda: not alive(daemon), "the daemon's end")
