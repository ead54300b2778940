"""Data as people have it is what the same records in a list are."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from apollo_client import read_samples, run_spec
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import training_pb2 as pb
from tests.programs import untraced

RECORDS = [{"prompt": f"{n} and 1 is", "completion": f" {n + 1}."} for n in range(5)]
ASKED = [{"question": r["prompt"], "answer": r["completion"], "id": "x"} for r in RECORDS]
COLUMNS = {"prompt": "question", "completion": "answer"}
EXPECTED = run_spec(RECORDS, {})


class Dataset:
    """What a dataset of Hugging Face is to us: a row at a time, as often as asked."""

    def __init__(self, rows: list[dict[str, Any]]):
        self._rows = rows

    def __iter__(self) -> Any:
        return iter(self._rows)


def lines(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def files(folder: Path, records: list[dict[str, Any]]) -> list[Path]:
    """The same records as lines, packed, and as one array."""
    made = {
        "a.jsonl": lines(records),
        "a.jsonl.gz": gzip.compress(lines(records[:2])) + gzip.compress(lines(records[2:])),
        "a.json": json.dumps(records, indent=1).encode(),
        "a.json.gz": gzip.compress(json.dumps(records).encode()),
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in made]


def test_a_files_path_is_what_its_records_are(tmp_path) -> None:
    for path in files(tmp_path, RECORDS):
        assert run_spec(path, {}) == run_spec(str(path), {}) == EXPECTED
        assert read_samples(path) == list(EXPECTED.samples)
    for path in files(tmp_path, ASKED):
        assert run_spec(path, {}, COLUMNS) == EXPECTED
        assert read_samples(path, COLUMNS) == list(EXPECTED.samples)


def test_anything_to_iterate_is_taken(tmp_path) -> None:
    assert run_spec(Dataset(RECORDS), {}) == run_spec(iter(RECORDS), {}) == EXPECTED
    assert run_spec(Dataset(ASKED), {}, COLUMNS) == EXPECTED


def test_columns_are_those_of_evaluation_samples_and_not_of_anchors() -> None:
    spec = run_spec(ASKED, {"evaluation_samples": ASKED[:1], "anchors": RECORDS[:1]}, COLUMNS)
    assert list(spec.evaluation_samples) == list(spec.anchors.samples) == [EXPECTED.samples[0]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_all_that_is_wrong_in_a_file_is_told_at_once_by_line(tmp_path, name) -> None:
    path = next(p for p in files(tmp_path, [RECORDS[0], *[{"prompt": 1}] * 30]) if p.name == name)
    with pytest.raises(InvalidArgument) as refused:
        run_spec(path, {})
    fields = [violation.field for violation in refused.value.violations]
    assert fields == [f"{path}:{line}" for line in range(2, 22)]
    assert refused.value.message == f"{path}:2: completion: is missing (and 29 more lines)"
    assert len(refused.value.__notes__) == 19


def test_splits_and_texts_are_told_what_to_give_instead() -> None:
    with pytest.raises(InvalidArgument, match="of a dataset's splits give one"):
        run_spec({"train": Dataset(RECORDS)}, {})
    with pytest.raises(InvalidArgument, match="too long to name a file"):
        run_spec("The sea is deep. " * 999, {})


def test_without_pyarrow_a_table_is_refused_with_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and so on")
    with pytest.raises(InvalidArgument, match="'pip install pyarrow' lets it be read"):
        run_spec(path, {})


def test_a_table_of_parquet_is_read_by_row(tmp_path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist(RECORDS), path)
    assert run_spec(path, {}) == EXPECTED
    parquet.write_table(arrow.Table.from_pylist([RECORDS[0], *[{"prompt": "a"}] * 2]), path)
    with pytest.raises(InvalidArgument, match=f"{path}:row 2: completion: is missing") as refused:
        run_spec(path, {})
    assert [v.field for v in refused.value.violations] == [f"{path}:row 2", f"{path}:row 3"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InvalidArgument, match="a Parquet table that cannot be read"):
        run_spec(path, {})


def test_a_frame_is_a_row_a_sample_without_its_missing_values(tmp_path) -> None:
    pandas = pytest.importorskip("pandas")
    assert run_spec(pandas.DataFrame(RECORDS), {}) == EXPECTED
    assert run_spec(pandas.DataFrame(ASKED), {}, COLUMNS) == EXPECTED
    rows = [{"context_ids": [1, 2], "continuation_ids": [3], "weight": 0.5}, RECORDS[0]]
    assert run_spec(pandas.DataFrame(rows), {}) == run_spec(rows, {})
    with pytest.raises(InvalidArgument, match=r"samples\[1\]: completion: is missing"):
        run_spec(pandas.DataFrame([RECORDS[0], {"prompt": "a"}]), {})


def test_a_frame_of_arrays_as_parquet_gives_is_taken(tmp_path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": talk}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    assert run_spec(pandas.read_parquet(tmp_path / "a.parquet"), {}) == run_spec(rows, {})
    assert run_spec(tmp_path / "a.parquet", {}) == run_spec(rows, {})


def test_a_dataset_of_hugging_face_is_taken() -> None:
    datasets = pytest.importorskip("datasets")
    assert run_spec(datasets.Dataset.from_list(RECORDS), {}) == EXPECTED
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(RECORDS))
    with pytest.raises(InvalidArgument, match="of a dataset's splits give one"):
        run_spec(splits, {})


def test_both_clients_take_a_file_wherever_samples_are_taken(connect, server, tmp_path) -> None:
    client, path = connect(server), files(tmp_path, ASKED)[1]
    events = client.train(path, columns=COLUMNS, dry_run=True)
    assert events[-1].finished.state == pb.RUN_STATE_SUCCEEDED
    assert client.call("validate", path, columns=COLUMNS).steps_total == 5
    assert len(client.call("count_tokens", path, columns=COLUMNS)) == 5
    assert len(client.call("score", path, columns=COLUMNS).scores) == 5
    made = client.call("create_dataset", path, columns=COLUMNS)
    run = client.call("create_run", dataset_id=made.dataset_id, dry_run=True)
    assert client.follow(run.run_id)[-1].finished.state == pb.RUN_STATE_SUCCEEDED


def test_the_client_is_imported_without_what_few_need() -> None:
    """What it costs is told by what it brings: the wire alone, and no terminal or tables."""
    code = "import sys, apollo_client; print(*{name.partition('.')[0] for name in sys.modules})"
    # Tracing it would import more.
    environment = untraced(os.environ)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "pandas", "pyarrow", "datasets", "typer", "rich", "html", "vllm"}
    assert not heavy & set(done.stdout.split())
