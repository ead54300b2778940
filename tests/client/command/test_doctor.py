"""`apollo doctor`: what it makes of the training server's verdict, of a log and of a config."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from apollo_client.command.app import app
from apollo_client.command.doctor import Diagnosis, served_length
from apollo_client.command.ending import stated_cause
from apollo_grpc.v1 import status_pb2

REASON = "vLLM's loader copies no part of it"


def status(attachment: int, detail: str, difference: float = 0.0) -> status_pb2.ServerStatus:
    found = status_pb2.ServerStatus(
        attachment=attachment, attachment_detail=detail, logprob_difference=difference
    )
    found.weight_map.architecture = "OtherForCausalLM"
    found.weight_map.parameters = found.weight_map.views = 13
    return found


def test_an_attached_model_is_supported_with_its_figures():
    diagnosis = Diagnosis("/m")
    diagnosis.take(status(status_pb2.ATTACHMENT_STATE_ATTACHED, "mapped", 2e-6))
    assert (diagnosis.supported, diagnosis.refused) == (True, [])
    assert (diagnosis.views, diagnosis.parameters) == (13, 13)
    assert diagnosis.max_logprob_difference == pytest.approx(2e-6)
    assert diagnosis.lines()[-1].split() == ["supported", "yes"]
    assert diagnosis.lines()[-2].split() == ["detail", "mapped"]


def test_derived_parameters_are_named():
    found = status(status_pb2.ATTACHMENT_STATE_ATTACHED, "mapped; A_log is not trained")
    found.weight_map.derived.extend(["h.0.A_log", "h.1.A_log"])
    diagnosis = Diagnosis("/m")
    diagnosis.take(found)
    assert (diagnosis.supported, diagnosis.refused) == (True, [])
    assert diagnosis.derived == ["h.0.A_log", "h.1.A_log"]
    assert any("A_log is not trained" in line for line in diagnosis.lines())


def test_each_refused_parameter_is_named_with_its_reason():
    found = status(status_pb2.ATTACHMENT_STATE_REFUSED, "1 of 13 parameters are no views")
    found.weight_map.views = 12
    found.weight_map.refused.add(name="h.0.qkv.weight", reason=REASON)
    diagnosis = Diagnosis("/m")
    diagnosis.take(found)
    assert (diagnosis.supported, diagnosis.max_logprob_difference) == (False, None)
    assert diagnosis.refused == [{"name": "h.0.qkv.weight", "reason": REASON}]
    assert f"refused      h.0.qkv.weight: {REASON}" in diagnosis.lines()


def test_of_many_refused_parameters_three_are_printed_and_the_json_has_all():
    found = status(status_pb2.ATTACHMENT_STATE_REFUSED, "109 of 109 parameters are no views")
    names = [f"h.{n}.weight" for n in range(109)]
    for name in names:
        found.weight_map.refused.add(name=name, reason=REASON)
    diagnosis = Diagnosis("/m")
    diagnosis.take(found)
    lines = diagnosis.lines()
    assert [line for line in lines if REASON in line] == [
        f"refused      {name}: {REASON}" for name in names[:3]
    ]
    assert "refused      and 106 more, all of which --json tells" in lines
    assert "verdict      109 of 109 parameters are no views" in lines
    assert [refused["name"] for refused in asdict(diagnosis)["refused"]] == names


def test_a_long_reason_of_a_tensor_is_cut_and_the_json_has_all_of_it():
    found = status(status_pb2.ATTACHMENT_STATE_REFUSED, "1 of 13 parameters are no views")
    reason = "no module named 'model'; the available ones are " + "layers.0.weight, " * 200
    found.weight_map.refused.add(name="norm.weight", reason=reason)
    diagnosis = Diagnosis("/m")
    diagnosis.take(found)
    (line,) = [line for line in diagnosis.lines() if line.startswith("refused")]
    assert "norm.weight: no module named 'model'" in line
    assert len(line) < 250
    assert asdict(diagnosis)["refused"] == [{"name": "norm.weight", "reason": reason}]


def test_a_model_that_is_refused_as_a_whole_gives_the_servers_reason():
    found = status(status_pb2.ATTACHMENT_STATE_REFUSED, "quantised (QUANTIZED)")
    diagnosis = Diagnosis("/m")
    diagnosis.take(found)
    assert diagnosis.refused == [{"name": "OtherForCausalLM", "reason": "quantised (QUANTIZED)"}]


@pytest.mark.parametrize(
    "line",
    [
        "ValueError: no such layer",
        "(EngineCore pid=71) ValueError: no such layer",
        "(EngineCore pid=71) ERROR 11-24 10:00:00 [core.py:12] ValueError: no such layer",
    ],
)
def test_the_cause_is_the_first_error_of_the_log(line):
    warning = "WARNING 11-24 [system.py:3] could not raise the limit: OSError: too many open files"
    log = f"INFO fine\n{warning}\n{line}\nRuntimeError: the engine did not start\n"
    assert stated_cause(log) == "ValueError: no such layer"


def test_the_cause_is_what_a_process_of_vllms_said_not_that_it_failed():
    log = (
        "subprocess.CalledProcessError: Command 'python' returned non-zero exit status 1.\n"
        "RuntimeError: Error raised in subprocess:\n"
        "ModuleNotFoundError: No module named 'torchvision'\n"
    )
    assert stated_cause(log) == "ModuleNotFoundError: No module named 'torchvision'"


def test_a_log_without_an_error_is_said_to_have_none():
    assert stated_cause("INFO Error: rates were low\n") == "its log names no error"


def test_a_long_context_is_shortened_unless_the_user_says_how_long_it_is():
    config = {"max_position_embeddings": 131072}
    assert served_length(config, []) == ["--max-model-len", "1024"]
    assert served_length({"n_positions": 256}, []) == ["--max-model-len", "256"]
    assert served_length({"text_config": config}, []) == ["--max-model-len", "1024"]
    assert served_length(config, ["--max-model-len=99"]) == []
    assert served_length({}, []) == []


def test_a_folder_without_a_model_is_wrong_input(tmp_path):
    done = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert done.exit_code == 2
    assert "config.json" in done.output


@pytest.mark.long
def test_the_memory_alone_is_told_without_starting_anything(tiny_model):
    asked = ["--memory-only", "--step", "20+10", "--gpu-memory-gb", "24"]
    done = CliRunner().invoke(app, ["doctor", str(tiny_model), *asked, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["step"], told["total_bytes"]) == ("20 + 10", 24_000_000_000)
    assert 0 < told["gpu_memory_utilization"] < 1


def test_a_wrong_length_of_a_step_starts_nothing(tiny_model):
    done = CliRunner().invoke(app, ["doctor", str(tiny_model), "--step", "17"])
    assert done.exit_code == 1
    assert "no length of a step" in done.output


def test_the_json_has_the_documented_names():
    names = {"supported", "architecture", "parameters", "views", "refused"}
    assert names | {"max_logprob_difference"} <= set(json.loads(json.dumps(asdict(Diagnosis("m")))))
