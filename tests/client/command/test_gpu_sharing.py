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

CLIENT = """
import os, pathlib
assert (pathlib.Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"]) / "control").exists()
assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
"""


@pytest.fixture
def control(tmp_path, monkeypatch):
    """Puts the program on the path; says what its daemon does before it serves."""

    def make(daemon: str = "pass", client: str = "") -> None:
        program = tmp_path / "bin" / CONTROL
        program.parent.mkdir()
        program.write_text(DAEMON.format(python=sys.executable, daemon=daemon))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(gpu_sharing, "engine_on_cpu", lambda: False)
        monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
        # As CUDA's driver does, a client looks for the daemon and for its own GPU.
        monkeypatch.setattr(gpu_sharing, "_CLIENT", client or CLIENT)

    return make


BY_MPS = pytest.mark.parametrize("asked", [GpuSharing.AUTO, GpuSharing.MPS])


@BY_MPS
def test_both_meet_at_the_daemon_and_the_trainer_goes_behind(control, tmp_path, asked):
    control("(pipe / 'sees').write_text(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))")
    with shared_gpu(asked, tmp_path / "state") as shared:
        pipe = Path(shared.both["CUDA_MPS_PIPE_DIRECTORY"])
        daemon = int((pipe / "pid").read_text())
        assert alive(daemon)
        assert (pipe / "sees").read_text() == "all"
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


def test_by_turns_nothing_is_started(control, tmp_path):
    control("(pipe / 'started').touch()")
    with shared_gpu(GpuSharing.TIME, tmp_path / "state") as shared:
        assert (shared.both, shared.trainer, shared.notes) == ({}, {}, ())
    assert not (tmp_path / "state").exists()


def test_a_model_on_the_cpu_needs_no_daemon_and_no_word(control, tmp_path, monkeypatch):
    control()
    monkeypatch.setattr(gpu_sharing, "engine_on_cpu", lambda: True)
    with shared_gpu(GpuSharing.AUTO, tmp_path / "state") as shared:
        assert (shared.both, shared.notes) == ({}, ())


def test_a_daemon_that_is_there_is_used(control, tmp_path, monkeypatch):
    control()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/run/mps")
    with shared_gpu(GpuSharing.AUTO, tmp_path / "state") as shared:
        assert (shared.both, list(shared.trainer)) == ({}, ["CUDA_MPS_CLIENT_PRIORITY"])
        assert "the MPS daemon of /run/mps" in shared.notes[0]
    assert not (tmp_path / "state").exists()


def test_a_machine_without_mps_goes_by_turns_or_is_told(control, tmp_path, monkeypatch):
    control()
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(FailedPrecondition, match="--gpu-sharing time needs neither") as raised,
        shared_gpu(GpuSharing.MPS, tmp_path / "state"),
    ):
        pass
    assert raised.value.reason == "MPS_NOT_FOUND"
    assert "Nothing was started." in raised.value.message
    with shared_gpu(GpuSharing.AUTO, tmp_path / "state") as shared:
        assert (shared.both, shared.trainer) == ({}, {})
        assert shared.notes[0].startswith("GPU shared by turns. MPS needs")


@pytest.mark.parametrize(
    ("daemon", "client"),
    [
        ("sys.exit(3)", ""),
        ("pass", "import sys; sys.exit(1)"),
        ("pass", "import time; time.sleep(99)"),
    ],
)
def test_a_daemon_without_clients_is_told_with_its_log(
    control, tmp_path, monkeypatch, daemon, client
):
    monkeypatch.setattr(gpu_sharing, "START_SECONDS", 1.0)
    control(daemon, client)
    with shared_gpu(GpuSharing.AUTO, tmp_path / "state") as shared:
        assert (shared.both, shared.trainer) == ({}, {})
        assert "The MPS daemon did not start" in shared.notes[0]
    (pid,) = (tmp_path / "state").glob("mps-*/pipe/pid")
    assert not alive(int(pid.read_text()))
    with (
        pytest.raises(FailedPrecondition, match=r"its log is in .*/log") as raised,
        shared_gpu(GpuSharing.MPS, tmp_path / "state"),
    ):
        pass
    assert raised.value.reason == "MPS_NOT_STARTED"
    assert "Nothing was started." in raised.value.message


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
        gpu_sharing._CLIENT = "pass"
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
