"""docs/models.md is what a run saw: made from its records, whole, and without a broken family."""

from __future__ import annotations

import json
import re

import pytest

from tests.vllm.families import TESTED
from tests.vllm.models_table import PAGE, RESULT, page, read_records
from tests.vllm.records import BROKEN, NOT_SERVED, REFUSED, SWEEP, WORKS


@pytest.fixture(scope="module")
def result():
    return json.loads(RESULT.read_text())


def test_the_page_is_the_one_that_the_records_make(result):
    assert PAGE.read_text() == page(result)


def test_every_family_was_tried_and_none_is_broken(result):
    verdicts = {record["family"]: record["verdict"] for record in result["families"]}
    assert list(verdicts) == list(SWEEP)
    assert set(verdicts.values()) <= {WORKS, REFUSED, NOT_SERVED}
    assert {verdicts[name] for name in TESTED} == {WORKS}


def test_what_works_has_figures_within_the_tolerance_and_what_does_not_has_a_reason(result):
    for record in result["families"]:
        if record["verdict"] != WORKS:
            assert record["reason"]
            continue
        tolerance = SWEEP[record["family"]].tolerance_nats
        assert max(record["before"], record["after"]) < tolerance
        derived = record.get("derived", [])
        assert record["views"] + len(derived) == record["parameters"] > len(derived)
        assert record["loss_last"] < 0.7 * record["loss_first"]


def test_derived_parameters_are_counted_beside_the_views(result):
    works = next(record for record in result["families"] if record["verdict"] == WORKS)
    shown = page(result | {"families": [works | {"views": 28, "parameters": 29, "derived": ["a"]}]})
    assert "| 28 of 29, 1 derived |" in shown


def test_no_reason_is_a_mistake_of_the_servers_or_tells_of_a_folder(result):
    for record in result["families"]:
        assert "mistake" not in record["reason"]
        assert not re.search(r"(^|\s)/\w", record["reason"])


def test_a_broken_family_is_shown_as_one(result):
    spoilt = dict(result["families"][0], verdict=BROKEN, reason="it | crashed")
    shown = page(result | {"families": [spoilt, *result["families"][1:]]})
    assert "## Broken" in shown
    assert "it \\| crashed" in shown


def test_a_pretrained_model_has_its_place_where_it_could_be_fetched(result):
    without = {name: part for name, part in result.items() if name != "pretrained"}
    real = {"model": "Real", "elements": 1000, "parameters": 12, "before": 1e-5, "after": 2e-5}
    assert "## Pretrained" not in page(without)
    shown = page(without | {"pretrained": real})
    assert shown.index("## Work") < shown.index("## Pretrained") < shown.index("## Refused")
    assert "1.0e-05 nats before and 2.0e-05 after" in shown


def test_records_that_are_not_all_there_make_no_page(tmp_path):
    with pytest.raises(SystemExit, match="no record of qwen3, llama"):
        read_records(tmp_path)
