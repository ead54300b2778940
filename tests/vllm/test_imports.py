"""What vLLM's process holds more of with the sidecar in it."""

from __future__ import annotations

import sys

import pytest

from tests import programs

pytestmark = pytest.mark.vllm


def test_beside_vllm_the_sidecar_adds_the_wire_and_its_own_room_alone():
    quiet = {"VLLM_PLUGINS": "apollo", "VLLM_LOGGING_LEVEL": "ERROR"}
    printed = programs.run_beside_vllm("tests.vllm.added_modules", **quiet)
    added = set(printed.splitlines()[-1].split()) - set(sys.stdlib_module_names)
    assert {"apollo_sidecar", "apollo_grpc"} <= added
    assert added <= {"apollo_sidecar", "apollo_grpc", "grpc", "google"}
