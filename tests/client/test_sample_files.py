"""Files of samples: taken where the meaning is clear, else told where they are wrong, once."""

from __future__ import annotations

import gzip
import io
import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_client import read_samples, run_spec, sample_files, to_samples
from apollo_client.forms import SAMPLES as SAMPLE_FORM
from apollo_client.sample_files import read_placed, read_stream
from apollo_grpc.errors import InvalidArgument

GOOD = {"context": "a", "continuation": "b"}
LINE = json.dumps(GOOD)
BOM = b"\xef\xbb\xbf"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
CHAT = {
    "messages": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y", "weight": 1},
        {"role": "assistant", "content": "z"},
    ]
}
SAMPLES = st.lists(
    st.fixed_dictionaries(
        {"context": TEXT, "continuation": TEXT}, optional={"teacher_context": TEXT}
    )
    | st.fixed_dictionaries(
        {"context_ids": st.lists(st.integers(0, 99)), "continuation_ids": st.just([1])},
        optional={
            "weight": st.floats(0, 9),
            "teacher_context_ids": st.lists(st.integers(0, 99)),
            "advantages": st.floats(-9, 9) | st.lists(st.floats(-9, 9), min_size=1, max_size=1),
            "sampler_log_probabilities": st.lists(st.floats(-9, 0), max_size=1),
        },
    )
    | st.just(CHAT),
    min_size=1,
    max_size=5,
)


def read(data, form=SAMPLE_FORM):
    return read_stream(io.BytesIO(data), "facts.jsonl", form)


def samples_of(data):
    return [placed.value for placed in read(data)]


def refusal(data):
    with pytest.raises(InvalidArgument) as refused:
        read(data)
    return refused.value


def lines(values, ascii=False):
    return [json.dumps(value, ensure_ascii=ascii).encode() for value in values]


@given(SAMPLES, st.booleans())
def test_a_file_holds_what_the_same_objects_in_python_are(tmp_path_factory, values, ascii):
    data = b"\n".join(lines(values, ascii))
    path = tmp_path_factory.getbasetemp() / "samples.jsonl"
    path.write_bytes(data)
    expected = [sample for value in values for sample in to_samples(value)]
    assert read_samples(path) == read_samples(str(path)) == samples_of(data) == expected
    assert list(run_spec(read_placed(path, SAMPLE_FORM), {}).samples) == expected


@given(SAMPLES, st.data())
def test_line_ends_marks_and_blank_lines_change_nothing(values, data):
    text = data.draw(st.sampled_from([b"", BOM])) + b"".join(
        data.draw(st.sampled_from([b"", b"\n", b" \t\r\n"]))
        + data.draw(st.sampled_from([b"", b" "]))
        + line
        + data.draw(st.sampled_from([b"\n", b"\r\n", b" \n"]))
        for line in lines(values)
    )
    assert samples_of(text) == samples_of(b"\n".join(lines(values))) == samples_of(text.rstrip())


@given(SAMPLES, st.sampled_from([None, 1, "\t"]))
def test_one_array_or_objects_over_lines_hold_the_same(values, indent):
    by_line = samples_of(b"\n".join(lines(values)))
    assert samples_of(json.dumps(values, indent=indent).encode()) == by_line
    objects = "\n".join(json.dumps(value, indent=indent) for value in values)
    assert samples_of(BOM + objects.encode()) == by_line


@pytest.mark.parametrize(
    "mark", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\x1e", "\r", "\t"]
)
def test_no_character_but_lf_ends_a_line(mark):
    line = f'{{"context": "a{mark}b", "continuation": "c{mark}"}}\n'.encode()
    sample, _ = samples_of(line + LINE.encode())
    assert (sample.text.context, sample.text.continuation) == (f"a{mark}b", f"c{mark}")
    assert refusal(line + b"{").violations[0].field == "facts.jsonl:2"


def test_each_sample_knows_its_line():
    text = f"\n{LINE}\n{json.dumps(CHAT)}\r\n\n{LINE}".encode()
    assert [placed.place.split(":")[1] for placed in read(text)] == ["2", "3", "3", "5"]
    array = json.dumps([GOOD, CHAT, GOOD], indent=1).encode()
    assert [placed.place.split(":")[1] for placed in read(array)] == ["2", "6", "6", "23"]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"context": "a", "continuatoin": "b"}', "continuatoin"),
        ('{"context": "a"}', "continuation"),
        ('{"context": "a", "continuation": null}', "continuation"),
        ('{"context": "a", "continuation_ids": [1]}', "forms"),
        ('{"prompt": "a"}', "completion: is missing"),
        ('{"id": "a"}', "forms"),
        ('["a", "b"]', "forms"),
        ('{"context_ids": ["x"], "continuation_ids": [1]}', "context_ids"),
        ('{"context_ids": [1], "continuation_ids": [4294967296]}', "continuation_ids"),
        ('{"context": 3, "continuation": "b"}', "context"),
        ("{", "no JSON"),
        (LINE + ",", "more after its value, at column 38"),
        ('{"context": "a", "context": "c", "continuation": "b"}', "the key context twice"),
        ('{"messages": [{"role": "a", "role": "b", "content": ""}]}', "the key role twice"),
        ('{"context_ids": [1], "continuation_ids": [1], "weight": NaN}', "NaN"),
        ('{"context_ids": [1], "continuation_ids": [1], "weight": -Infinity}', "-Infinity"),
        ('{"context_ids": [' + "9" * 5000 + '], "continuation_ids": [1]}', "too many digits"),
        ('{"context": "\\ud800", "continuation": "b"}', "half a character"),
        ('{"\\ud800": "a"}', "forms"),
        ("[" * 100_000, "too deep"),
        ('{"context": ' + "[" * 100_000, "too deep"),
        ('{"context": ' + '{"a":' * 100_000, "too deep"),
    ],
)
def test_a_wrong_line_is_told_with_its_number_and_the_mistake(line, word):
    told = refusal("\n".join([LINE, "", line, LINE, line]).encode())
    assert [v.field for v in told.violations] == ["facts.jsonl:3", "facts.jsonl:5"]
    assert word in told.message and "(and 1 more lines)" in told.message
    assert all(len(v.description) < 300 for v in told.violations)


def test_of_many_wrong_lines_the_first_are_told_and_the_rest_are_counted():
    told = refusal(b"\n".join([LINE.encode(), *[b"{"] * 99]))
    assert [v.field for v in told.violations] == [f"facts.jsonl:{n}" for n in range(2, 22)]
    assert "(and 98 more lines)" in told.message
    assert "at least 9999 more lines" in refusal(b'{"prompt": 1}\n' * 20_000).message


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ('[\n {"context": "a",\n  "continuation": b}\n]', 3, "Expecting value"),
        ('{\n "context": "a"\n "continuation": "b"\n}', 3, "','"),
        (f"[\n{LINE}\n{LINE}\n]".replace("}", "}}", 1), 2, "array does not end"),
        (f"[\n{LINE},\n{LINE[1:]},\n{LINE}\n]", 3, "no object"),
        (f"[\n{LINE},\n{LINE}\n]".replace("]", "]\n]"), 5, "more after its array"),
        (f"[\n{LINE},\n{LINE}".replace("{", "\n[", 1), 3, "no"),
        ("context,continuation\na,b\n", 1, "Expecting value"),
        ("{'context': 'a', 'continuation': 'b'}\n" * 9, 1, "double quotes"),
        ("[1,\n2]", 1, "no object"),
        ('"a"\n"b"', 1, "no object"),
        ("[" * 100_000 + "\n" + "]" * 100_000, 1, "too deep"),
    ],
)
def test_what_holds_no_object_in_any_line_is_told_once(text, line, word):
    told = refusal(text.encode())
    assert [v.field for v in told.violations] == [f"facts.jsonl:{line}"]
    assert word in told.message and "a line is one object" in told.message


def test_an_array_names_all_its_wrong_objects():
    values = [GOOD, {"prompt": "a"}, CHAT, {"context": "a"}]
    told = refusal(json.dumps(values, indent=0).encode())
    assert [v.field for v in told.violations] == ["facts.jsonl:6", "facts.jsonl:26"]
    twins = f'[{LINE},\n{{"context": "a", "context": "b", "continuation": "c"}}]'
    assert "facts.jsonl:2: has the key context twice" in refusal(twins.encode()).message


def packed(data: bytes) -> bytes:
    """In gzip, without the time: each process of the tests finds the same cases."""
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "holds no samples"),
        (b"\n\r\n \n", "holds no samples"),
        (b"[]", "holds no samples"),
        (BOM, "holds no samples"),
        (LINE.encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        (LINE.encode("utf-32"), "UTF-32 text: save it as UTF-8"),
        (b"\xfe\xff" + LINE.encode("utf-16-be"), "UTF-16 text"),
        (b"\0\0\xfe\xff" + LINE.encode("utf-32-be"), "UTF-32 text"),
        (LINE.encode("utf-16-le"), "no text, or UTF-16"),
        (b"\x1f\x8b\x08\0\0", "a gzip archive that cannot be unpacked"),
        (b"PK\x03\x04", "a zip archive: unpack it"),
        (b"\x28\xb5\x2f\xfd", "a zstd archive"),
        (packed(b""), "holds no samples"),
        (packed(LINE.encode())[:-9], "a gzip archive that cannot be unpacked"),
        (packed(packed(b"")), "a gzip archive within another: unpack it"),
        (packed(b"PAR1"), "a Parquet table: write it as JSON lines"),
        (bytes(2000), "no text"),
    ],
)
def test_what_holds_no_lines_is_told_in_one_sentence(data, words):
    told = refusal(data)
    assert [v.field for v in told.violations] == ["facts.jsonl"]
    assert words in told.message and "\n" not in told.message


@pytest.mark.parametrize("start", [[], [LINE], ["["]])
def test_another_encoding_is_told_with_the_line_and_the_byte(start):
    line = '{"context": "caf\u00e9", "continuation": "b"}'.encode("latin-1")
    told = refusal(b"\n".join([*[each.encode() for each in start], line]))
    assert told.violations[0].field == f"facts.jsonl:{len(start) + 1}"
    assert "no UTF-8: byte 0xE9 at column 17; save it as UTF-8" in told.message


def test_more_than_any_run_takes_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(sample_files, "MAX_FILE_BYTES", 2**20)

    class Endless(io.RawIOBase):
        asked = 0

        def read(self, size=-1):
            self.asked += size
            return b" " * size

    stream = Endless()
    with pytest.raises(InvalidArgument, match=r"longer than 1 MiB.*split"):
        read_stream(stream, "stdin", SAMPLE_FORM)
    assert stream.asked == 2**20 + 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "is a directory: name a file"),
        (lambda path: os.mkfifo(path), "is a named pipe"),
        (lambda path: path.symlink_to("/proc/self/mem"), "Input/output error"),
        (lambda path: path.symlink_to("/dev/null"), "holds no samples"),
        (lambda path: path.symlink_to("/dev/zero"), "no text"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
    ids=["missing", "directory", "fifo", "unreadable", "null", "zero", "loop"],
)
def test_what_is_no_file_is_told_in_one_sentence(tmp_path, make, words):
    path = tmp_path / "facts.jsonl"
    make(path)
    with pytest.raises(InvalidArgument, match=words) as refused:
        read_samples(path)
    assert refused.value.message.startswith(f"{path}: ")


def test_a_name_that_no_terminal_can_show_is_told_escaped(tmp_path):
    for name in ("\udcff\x1b[31m", "a\0b"):
        with pytest.raises(InvalidArgument) as refused:
            read_samples(tmp_path / name)
        assert refused.value.message.isprintable()


def test_a_pipe_that_a_shell_opened_is_read():
    reader, writer = os.pipe()
    os.write(writer, LINE.encode())
    os.close(writer)
    assert len(read_samples(f"/dev/fd/{reader}")) == 1
    os.close(reader)


def test_a_weight_beyond_all_numbers_reaches_the_server_as_what_it_is():
    (sample,) = samples_of(b'{"context": "a", "continuation": "b", "weight": 1e999}')
    assert math.isinf(sample.weight)
