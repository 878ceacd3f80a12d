"""A log of any layout gives the same events, and a fault in it loses only one entry."""

import gzip
import hashlib
import io
import os
import threading
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deploy.sandbox.account import Account
from deploy.sandbox.history import tangle
from worker.logs import compression, layout, reader
from worker.logs import writer as log_writer
from worker.logs.compression import zstd
from worker.logs.lines import LINE_BYTES_MAX, Lines

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
EVENTS = [event.payload() for event in tangle(1, contradictory=False).events][:3]
IDS = [event["id"] for event in EVENTS]
COMPACT = [msgspec.json.encode(event) for event in EVENTS]
NDJSON = b"".join(line + b"\n" for line in COMPACT)


def pretty(value: object, indent: int = 2) -> bytes:
    """Return *value* as JSON over many lines."""
    return msgspec.json.format(msgspec.json.encode(value), indent=indent)


def page(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a page of Stripe's list of events."""
    return {"object": "list", "data": events, "has_more": False, "url": "/v1/events"}


def lines_of(events: list[dict[str, Any]]) -> bytes:
    """Return *events* as NDJSON."""
    return b"".join(msgspec.json.encode(event) + b"\n" for event in events)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], list[str]]:
    """Return a function that reads a log, and returns for each entry the event's id, or the line and the fault."""

    def entries(log: bytes) -> list[str]:
        path = tmp_path / "log"
        path.write_bytes(log)
        return [
            entry.delivery.envelope.id if entry.delivery else f"{entry.place.removeprefix(str(path))} {entry.fault}"
            for entry in reader.read(str(path), account="", now=NOW)
        ]

    return entries


LAYOUTS = {
    "NDJSON": NDJSON,
    "no line break at the end": NDJSON.rstrip(),
    "blank lines": b"\n  \n" + NDJSON.replace(b"\n", b"\n\n"),
    "CRLF": NDJSON.replace(b"\n", b"\r\n"),
    "byte order mark": b"\xef\xbb\xbf" + NDJSON,
    "array": msgspec.json.encode(EVENTS),
    "pretty array": pretty(EVENTS),
    "array, an element a line": b"[\n" + b",\n".join(COMPACT) + b"\n]\n",
    "array, commas first": b"[" + b"\n,".join(COMPACT) + b"]",
    "array with a byte order mark": b"\xef\xbb\xbf" + pretty(EVENTS),
    "list page": msgspec.json.encode(page(EVENTS)),
    "pretty list page": pretty(page(EVENTS)),
    "pages, one a line": b"".join(msgspec.json.encode(page([event])) + b"\n" for event in EVENTS),
    "pretty pages, one after the other": b"".join(pretty(page([event])) for event in EVENTS),
    "data": msgspec.json.encode({"data": EVENTS}),
    "pretty data": pretty({"data": EVENTS}, indent=4),
    "pretty events, one after the other": b"\n".join(pretty(event) for event in EVENTS),
    "one after the other, no line break": b"".join(COMPACT),
    "all of it": COMPACT[0] + b"\n" + pretty(EVENTS[1]) + b"\n[" + COMPACT[2] + b"]\n",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(read: Callable[[bytes], list[str]], layout: str) -> None:
    """Every layout gives the same events, in the same order."""
    assert read(LAYOUTS[layout]) == IDS


def test_one_pretty_event(read: Callable[[bytes], list[str]]) -> None:
    """A file may be one event over many lines."""
    assert read(pretty(EVENTS[0])) == IDS[:1]


COMPRESSED = {
    "gzip": gzip.compress(NDJSON),
    "gzip, several members": b"".join(gzip.compress(line + b"\n") for line in COMPACT),
    "Zstandard": zstd.compress(NDJSON),
    "Zstandard, several frames": b"".join(zstd.compress(line + b"\n") for line in COMPACT),
    "Zstandard, a frame cut within a line": zstd.compress(NDJSON[:99]) + zstd.compress(NDJSON[99:]),
    "Zstandard, a frame to be skipped": b"\x50\x2a\x4d\x18\x04\x00\x00\x00note" + zstd.compress(NDJSON),
    "Zstandard, pretty": zstd.compress(pretty(page(EVENTS))),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed(read: Callable[[bytes], list[str]], kind: str) -> None:
    """A compressed log is recognised by its content and gives the same events."""
    assert read(COMPRESSED[kind]) == IDS


EMPTY = {
    "nothing": b"",
    "white space": b"\n \r\n",
    "gzip": gzip.compress(b""),
    "Zstandard": zstd.compress(b""),
    "array": b"[]",
    "array, pretty": b"[\n]\n",
}


@pytest.mark.parametrize("log", EMPTY.values(), ids=EMPTY.keys())
def test_empty(read: Callable[[bytes], list[str]], log: bytes) -> None:
    """An empty log has no event and no fault."""
    assert read(log) == []


def test_bytes_are_kept(tmp_path: Path) -> None:
    """Each event's payload has exactly the bytes of the log, in any layout."""
    body = '{ "id":"evt_1" ,"type":"x","created":1, "data":{"object":{"name":"Zoë \\u00e9","price":1.50}}}'.encode()
    for log in (body, b"[" + body + b"]", b"[\n\n" + body + b"\n]", b'{"object":"list",\n"data": [' + body + b"]}"):
        (tmp_path / "log").write_bytes(log)
        (entry,) = reader.read(str(tmp_path / "log"), account="", now=NOW)
        assert entry.delivery is not None
        assert entry.delivery.envelope.payload == body


# A broken line, and a word of its fault.
BROKEN_LINES = {
    "garbage": (b"garbage", "not JSON"),
    "cut in a key": (b'{"id": "evt_9", "ty', "not JSON"),
    "cut in a text": (b'{"id": "evt_', "not JSON"),
    "cut after a colon": (b'{"id":', "not JSON"),
    "cut after a comma": (b'{"id": "evt_9",', "not JSON"),
    "cut in nested objects": (b'{"id": "evt_9", "data": {"object": {', "not JSON"),
    "wrong encoding": ('{"id":"evt_9","type":"é","created":1}'.encode("latin-1"), "not UTF-8"),
    "key twice": (b'{"id":"evt_9","id":"evt_8","type":"x","created":1}', "'id' twice"),
    "key twice, with spaces": (
        b'{"id":"evt_9","type":"x","created":1,"data":{"object":{"a" :1,"b":2,"b"\t:3}}}',
        "'b' twice",
    ),
    "nested key twice": (b'{"id":"evt_9","type":"x","created":1,"data":{"object":{"a":1,"a":2}}}', "'a' twice"),
    "no event": (b'{"object":"customer","id":"cus_1"}', "no type"),
    "a number": (b"42", "no id"),
    "null": (b"null", "no id"),
    "an empty object": (b"{}", "no id"),
    "no time": (b'{"id":"evt_9","type":"x","created":"noon"}', "created"),
    "deep brackets": (b"[" * 10_000 + b"]" * 10_000, "no id"),
    "our own, without its name": (
        b'{"account":"payfold.delivery","source":"gap","received_at":"2026-11-22T12:00Z","signature":null,%b}'
        % b'"payload_sha256":"","redacted":[],"payload":"{}"',
        "no id",
    ),
    "our own, without its payload": (b'{"object":"payfold.delivery","account":""}', "no line of our log"),
}


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("kind", BROKEN_LINES)
def test_broken_line(read: Callable[[bytes], list[str]], kind: str, place: str) -> None:
    """A broken line is reported with its number and its fault, and every other line is read."""
    line, words = BROKEN_LINES[kind]
    at = {"first": 0, "middle": 1, "last": 3}[place]
    lines = [*COMPACT[:at], line, *COMPACT[at:]]

    entries = read(b"\n".join(lines) + b"\n")

    fault = entries.pop(at)
    assert fault.startswith(f": line {at + 1} ")
    assert words in fault or "ends before" in fault
    assert entries == IDS


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (b'{"a": tru}\n' + NDJSON, ": line 1 it is not JSON: Expecting value (column 7)"),
        (NDJSON + '{"ä": "ö", }\n'.encode() + NDJSON, None),
        (
            b'{"id": "evt_9",\n' + NDJSON,
            ": line 1 it is not JSON: the line ends before the JSON that begins in it does",
        ),
        (b'{"id": "evt_\n' + NDJSON, ": line 1 it is not JSON: the line ends before the JSON that begins in it does"),
        (b'{"id": "evt_9"\n' + NDJSON, ": line 1 it is not JSON: the line ends before the JSON that begins in it does"),
        ("  äh\n".encode() + NDJSON, ": line 1 it is not JSON: Expecting value (column 3)"),
        (b'42 {"a": 1}\n' + NDJSON, ": line 1 it is not JSON: Extra data (column 4)"),
        (b"NaN\n" + NDJSON, ": line 1 it is not JSON: NaN is no value (column 1)"),
        (b'{"a": "NaN \\" NaN", "b": NaN}\n' + NDJSON, ": line 1 it is not JSON: NaN is no value (column 26)"),
        (b'{"a": {"b": [1, -Infinity]}}\n' + NDJSON, ": line 1 it is not JSON: -Infinity is no value (column 17)"),
        (b'{\n  "a": 1,\n  "b": Infinity\n}\n', ": line 1 it is not JSON: Infinity is no value (line 3, column 8)"),
        (
            b'[\n  {"id": "evt_9",\n   "type": no\n  },\n  {}\n]\n',
            f": line 2 it is not JSON: Expecting value (line 3, column 12){layout.SKIPPED}",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd.compress])
def test_one_place(
    read: Callable[[bytes], list[str]], log: bytes, expected: str | None, compress: Callable[[bytes], bytes]
) -> None:
    """A fault has one place: the line of the file and the column in it; a second line only in JSON over many lines."""
    faults = [entry for entry in read(compress(log)) if entry.startswith(": line")]

    assert faults[0] == (expected or ": line 4 it is not JSON: a key is missing (column 12)")


@pytest.mark.parametrize(
    ("closed", "expected"),
    [
        (9_999, "it is not JSON: the line ends before the JSON that begins in it does"),
        (10_001, "it is not JSON, and nested too deeply for the place to be found"),
    ],
)
def test_no_place_in_what_is_nested_too_deeply(read: Callable[[bytes], list[str]], closed: int, expected: str) -> None:
    """If the nesting is too deep for Python's reader, the brackets still show whether the line was cut."""
    fault, *others = read(b'{"a":' * 10_000 + b'"]}"' + b"}" * closed + b"\n" + NDJSON)

    assert (fault, others) == (f": line 1 {expected}", IDS)


def test_one_place_of_a_long_array(read: Callable[[bytes], list[str]]) -> None:
    """The column counts from the start of the line, even if most of the line was dropped from memory."""
    before = b"[" + b",".join(COMPACT * 400)
    assert len(before) > 4 * compression.CHUNK_BYTES

    *_, fault = read(before + b', {"id": nil}]\n')

    assert fault.startswith(f": line 1 it is not JSON: Expecting value (column {len(before.decode()) + 10}), and what")


def test_bracket_too_many(read: Callable[[bytes], list[str]]) -> None:
    """Junk after a complete event in its line is reported, and the event is read."""
    entries = read(COMPACT[0] + b"}\n" + COMPACT[1] + b"\n")

    assert (entries[0], entries[2]) == (IDS[0], IDS[1])
    assert entries[1].startswith(": line 1 it is not JSON")


def test_broken_lines_in_a_row(read: Callable[[bytes], list[str]]) -> None:
    """Each of several broken lines is reported, also after blank lines and a byte order mark."""
    entries = read(b"\xef\xbb\xbf\n{broken\ngarbage\n\n[broken too\n" + NDJSON)

    assert [entry.partition(" it")[0] for entry in entries] == [": line 2", ": line 3", ": line 5", *IDS]


def test_cut_last_line(read: Callable[[bytes], list[str]]) -> None:
    """A log that was cut in its last line gives all other events and a fault with the place."""
    assert read(NDJSON[:-100]) == [*IDS[:2], ": line 3 the file ends before the JSON that begins here does"]


@pytest.mark.parametrize("value", [EVENTS, page(EVENTS), {"data": EVENTS}], ids=["array", "page", "data"])
def test_cut_text(read: Callable[[bytes], list[str]], value: object) -> None:
    """A cut array or page over many lines gives the events before the cut, and one fault."""
    text = pretty(value)

    entries = read(text[: text.index(IDS[2].encode()) + 10])

    assert entries[:2] == IDS[:2]
    assert [": line 1 the file ends" in entry for entry in entries[2:]] == [True]


@pytest.mark.parametrize("text", [pretty(EVENTS), pretty(page(EVENTS), indent=4)], ids=["array", "page"])
def test_broken_element(read: Callable[[bytes], list[str]], text: bytes) -> None:
    """A broken element of an array over many lines costs the rest of the array, and nothing after it."""
    mark = f'"{IDS[1]}"'.encode()
    line = text[: text.rindex(b"{", 0, text.index(mark))].count(b"\n") + 1

    first, fault, *after = read(text.replace(mark, mark[1:]) + b"\n" + NDJSON)

    assert (first, after) == (IDS[0], IDS)
    assert fault.startswith(f": line {line} it is not JSON: ")
    assert fault.endswith("and what follows it in the array was skipped")


def test_broken_element_in_the_first_column(read: Callable[[bytes], list[str]]) -> None:
    """A broken element of an array with an element a line costs that element."""
    mark = f'"{IDS[1]}"'.encode()

    first, fault, last = read(LAYOUTS["array, an element a line"].replace(mark, mark[1:]))

    assert (first, last) == (IDS[0], IDS[2])
    assert fault.startswith(": line 3 it is not JSON: ")
    assert "skipped" not in fault


def test_broken_element_in_one_line(read: Callable[[bytes], list[str]]) -> None:
    """After a broken element the rest of a one-line array is skipped, which is reported; later lines are read."""
    mark = f'"{IDS[1]}"'.encode()
    array = b"[" + b",".join(COMPACT).replace(mark, mark[1:]) + b"]\n"

    entries = read(array + NDJSON)

    assert entries[0] == IDS[0]
    assert entries[1].endswith("and what follows it in the array was skipped")
    assert entries[2:] == IDS


def unread(path: Path) -> bytes:
    """Return a log of the unreadable texts of the log at *path*, each below a remark."""
    return b"".join(
        log_writer.remark(entry.place, entry.fault) + b"".join(entry.text).rstrip(b"\r\n") + b"\n"
        for entry in reader.read(str(path), account="", now=NOW)
        if entry.fault is not None
    )


SPOILT = {
    "NDJSON": NDJSON,
    "CRLF": NDJSON.replace(b"\n", b"\r\n"),
    "pretty array": pretty(EVENTS),
    "pretty page": pretty(page(EVENTS), indent=4),
    "array, an element a line": LAYOUTS["array, an element a line"],
}


@pytest.mark.parametrize("broken", IDS)
@pytest.mark.parametrize("layout", SPOILT)
def test_put_right(read: Callable[[bytes], list[str]], tmp_path: Path, layout: str, broken: str) -> None:
    """A fault comes with the complete unreadable text, which can be corrected and then be read."""
    mark = f'"{broken}"'.encode()
    read(SPOILT[layout].replace(mark, mark[1:]))

    rest = unread(tmp_path / "log")

    (fault,) = read(rest)
    assert fault.startswith((": line 2 it is not JSON: ", ": line 3 it is not JSON: "))
    assert unread(tmp_path / "log").partition(b"\n")[2] == rest.partition(b"\n")[2]
    ids = IDS[IDS.index(broken) :] if layout.startswith("pretty") else [broken]
    assert read(rest.replace(mark[1:], mark)) == ids


AFTER = [event.payload() for event in tangle(1, contradictory=False).events][3:6]
AFTER_IDS = [event["id"] for event in AFTER]
FAULTS: dict[str, Callable[[bytes, bytes], bytes]] = {
    "a quotation mark is missing": lambda log, mark: log.replace(mark, mark[1:]),
    "a comma is missing": lambda log, mark: log.replace(mark + b",", mark),
    "a bracket too many": lambda log, mark: log.replace(mark, mark + b"}"),
    "cut": lambda log, mark: log[: log.index(mark) + 9],
    "cut before a value": lambda log, mark: log[: log.index(mark)].rstrip(),
}


@pytest.mark.parametrize("following", [lines_of(AFTER), pretty(AFTER), pretty(page(AFTER)), pretty(AFTER[0])])
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost(read: Callable[[bytes], list[str]], tmp_path: Path, fault: str, following: bytes) -> None:
    """However a log is laid out and wherever it breaks, each event is read or refused with its text."""
    for layout_of_log in LAYOUTS.values():
        for number, broken in enumerate(IDS):
            spoilt = FAULTS[fault](layout_of_log, f'"{broken}"'.encode())
            entries = read(spoilt + b"\n" + following)

            refused = unread(tmp_path / "log")
            read_well = [entry for entry in entries if not entry.startswith(": line")]
            assert read_well[:number] == IDS[:number]
            assert broken not in read_well
            assert all(each in read_well or each.encode() in refused for each in IDS if each.encode() in spoilt)
            assert read_well[-1] in AFTER_IDS
            assert [each for each in read_well if each in AFTER_IDS] == [
                each for each in AFTER_IDS if each.encode() in following
            ]


def test_put_right_where_it_was_cut(read: Callable[[bytes], list[str]], tmp_path: Path) -> None:
    """A cut line or element can be completed and then be read."""
    for log in (NDJSON.rstrip(), pretty(EVENTS)[:-2].rstrip()):
        read(log[:-7])
        rest = unread(tmp_path / "log")
        assert read(rest.rstrip() + log[-7:]) == IDS[2:]


def test_a_long_unreadable_line_comes_in_pieces(read: Callable[[bytes], list[str]], tmp_path: Path) -> None:
    """The text of an unreadable line of 50 MB is passed on completely, in pieces as it is read."""
    line = b'{"id": "' + b"x" * 50 * 1024**2 + b'"}'
    (tmp_path / "log").write_bytes(line + b"\n" + NDJSON)

    entries = reader.read(str(tmp_path / "log"), account="", now=NOW)
    long = next(entries)
    sizes = [len(piece) for piece in long.text]

    assert long.fault is not None
    assert sum(sizes) in (len(line), len(line) + 1)
    assert max(sizes) <= LINE_BYTES_MAX
    assert [entry.delivery.envelope.id for entry in entries if entry.delivery] == IDS


def test_progress_in_bytes(tmp_path: Path) -> None:
    """Progress reports add up to the size of the compressed file."""
    path = tmp_path / "log"
    path.write_bytes(zstd.compress(NDJSON * 1000))
    reported: list[int] = []

    assert len(list(reader.read(str(path), account="", now=NOW, progress=reported.append))) == 3000
    assert sum(reported) == path.stat().st_size


def many(layout: Callable[[list[dict[str, Any]]], bytes]) -> tuple[bytes, list[str]]:
    """Return a log that compresses badly, and the ids in it."""
    account = Account(seed=1)
    for _ in range(300):
        account.create_payment_link(metadata={"noise": os.urandom(150).hex()})
    return layout([event.payload() for event in account.events]), [event.id for event in account.events]


@pytest.mark.parametrize("layout", [lines_of, pretty], ids=["lines", "pretty"])
@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress], ids=["gzip", "Zstandard"])
def test_cut_compressed_log(
    read: Callable[[bytes], list[str]],
    compress: Callable[[bytes], bytes],
    layout: Callable[[list[dict[str, Any]]], bytes],
) -> None:
    """A compressed log that was cut gives all complete events before the cut, and one fault."""
    log, ids = many(layout)

    *whole, fault = read(compress(log)[:-2000])

    assert len(whole) > 100
    assert whole == ids[: len(whole)]
    assert "the file breaks off: " in fault


@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress], ids=["gzip", "Zstandard"])
def test_junk_after_compressed_log(read: Callable[[bytes], list[str]], compress: Callable[[bytes], bytes]) -> None:
    """Junk after a compressed log is reported after all its events."""
    *whole, fault = read(compress(NDJSON) + b"junk, and more of it")

    assert whole == IDS
    assert fault.startswith(": line 4 the file breaks off: ")


def test_a_frame_with_a_wide_window(read: Callable[[bytes], list[str]]) -> None:
    """A frame of ``zstd --long=28``, whose window is wider than that program reads by default, is read."""
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.content_size_flag: 0}
    compressor = zstd.ZstdCompressor(options=options)

    log = compressor.compress(NDJSON, zstd.ZstdCompressor.FLUSH_BLOCK) + compressor.flush()

    assert zstd.get_frame_info(log).decompressed_size is None
    with pytest.raises(zstd.ZstdError, match="too much memory"):
        zstd.decompress(log, options={zstd.DecompressionParameter.window_log_max: 27})
    assert read(log) == IDS


def test_much_in_a_small_frame(read: Callable[[bytes], list[str]]) -> None:
    """A frame of some kilobytes that holds 256 MiB is read in pieces, in a fraction of the memory."""
    log = zstd.compress(b"x" * 256 * 1024**2 + b"\n" + NDJSON)
    assert len(log) < compression.CHUNK_BYTES
    tracemalloc.start()
    try:
        fault, *others = read(log)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert (fault, others) == (": line 1 it is longer than 16 MiB", IDS)
    assert peak < 4 * LINE_BYTES_MAX


@pytest.mark.parametrize("kind", ["an element", "keys", "keys of a page"])
def test_an_event_over_the_limit_over_many_lines(read: Callable[[bytes], list[str]], tmp_path: Path, kind: str) -> None:
    """An event over many lines that is too long is refused with its whole text, and the next one is read."""
    keys = b",\n".join(b'  "a": "' + b"x" * 1024**2 + b'"' for _ in range(20))
    long = b"{\n" + keys + b"\n}\n"
    if kind == "an element":
        long = b"[\n  {\n" + keys + b"\n  }\n]\n"
    elif kind == "keys of a page":
        long = b'{\n  "data": [],\n' + keys + b"\n}\n"

    fault, *others = read(long + NDJSON)

    assert fault.partition(" it")[2].startswith(" is longer than 16 MiB")
    assert unread(tmp_path / "log").count(b"x") == keys.count(b"x")
    assert others == IDS


@pytest.mark.parametrize("start", [b'{"id": "', b"x", b"[1, "], ids=["object", "garbage", "array"])
def test_line_over_the_limit(read: Callable[[bytes], list[str]], start: bytes) -> None:
    """An overlong line is reported, in bounded memory, and the next one is read."""
    entries = read(COMPACT[0] + b"\n" + start + b"x" * (LINE_BYTES_MAX + 5) + b"\n" + COMPACT[1] + b"\n")

    assert (entries[0], entries[-1]) == (IDS[0], IDS[1])
    assert len(entries) == 3 + (start == b"[1, ")
    assert all(entry.startswith(": line 2 ") for entry in entries[1:-1])


@pytest.mark.parametrize(
    "value",
    [b"9" * 5_000, b"1e999999", rb'"\ud800"', b"[" * 5_000 + b"]" * 5_000],
    ids=["number", "float", "half", "deep"],
)
def test_an_odd_event_of_a_page(read: Callable[[bytes], list[str]], value: bytes) -> None:
    """An event with a value that no decoder accepts is read like the others of its page."""
    odd = COMPACT[1][:-1] + b',"note":' + value + b"}"

    assert read(b'{"object":"list","data":[' + b",".join((COMPACT[0], odd, COMPACT[2])) + b'],"has_more":false}') == IDS


def test_a_number_without_end_over_many_lines(read: Callable[[bytes], list[str]]) -> None:
    """A number with more digits than Python converts does not stop the reading of a pretty-printed log."""
    assert (
        read(pretty(page(EVENTS)).replace(b'"livemode": false', b'"livemode": false, "n": ' + b"9" * 5_000, 1)) == IDS
    )


def test_array_over_the_limit_of_a_line(read: Callable[[bytes], list[str]]) -> None:
    """An array in one line may be longer than a line of single events: its elements are read one by one."""
    account = Account(seed=1)
    for _ in range(40):
        account.create_payment_link(metadata={"noise": "x" * (LINE_BYTES_MAX // 32)})

    assert read(b"[" + b",".join(event.body for event in account.events) + b"]") == [
        event.id for event in account.events
    ]


@pytest.mark.parametrize(
    ("log", "words"),
    [
        pytest.param(NDJSON.decode().encode("utf-16"), "UTF-16", id="UTF-16"),
        pytest.param(b"BZh91AY&SY...", "bzip2", id="bzip2"),
        pytest.param(b"PK\x03\x04...", "zip", id="zip"),
    ],
)
def test_another_kind_of_file(read: Callable[[bytes], list[str]], log: bytes, words: str) -> None:
    """A file of a known but unsupported kind is reported once, with its kind."""
    (fault,) = read(log)

    assert words in fault


def test_missing_file(tmp_path: Path) -> None:
    """A file that cannot be opened is an entry with a fault, so that other files are still read."""
    (entry,) = reader.read(str(tmp_path / "missing"), account="", now=NOW)

    assert (entry.delivery, entry.fault) == (None, "it cannot be read: No such file or directory")


def test_pipe(tmp_path: Path) -> None:
    """A log can be read from a pipe."""
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(COMPRESSED["gzip"],))
    writer.start()
    entries = list(reader.read(str(tmp_path / "pipe"), account="", now=NOW))
    writer.join()

    assert [entry.delivery and entry.delivery.envelope.id for entry in entries] == IDS


def test_account_of_a_log(tmp_path: Path) -> None:
    """An event that names its account keeps it, and other events get the log's account."""
    named = tangle(1).events[0].payload() | {"account": "acct_own"}
    (tmp_path / "log").write_bytes(COMPACT[0] + b"\n" + msgspec.json.encode(named))

    entries = reader.read(str(tmp_path / "log"), account="acct_log", now=NOW)

    assert [entry.delivery and entry.delivery.account for entry in entries] == ["acct_log", "acct_own"]


def own_line(**changed: object) -> bytes:
    """Return a line of our own log."""
    payload = COMPACT[0].decode()
    fields = {
        "account": "acct_1",
        "source": "webhook",
        "received_at": NOW,
        "signature": "t=1,v1=abc",
        "payload_sha256": hashlib.sha256(payload.encode()).hexdigest(),
        "redacted": [],
        "payload": payload,
    }
    return log_writer.write(msgspec.convert(fields | changed, log_writer.OwnLine))


def test_own_line(tmp_path: Path) -> None:
    """A line of our own log keeps account, signature, hash, blanked fields and the time of receipt."""
    (tmp_path / "log").write_bytes(own_line(redacted=["data.object.url"], payload_sha256="ab" * 32))

    (entry,) = reader.read(str(tmp_path / "log"), account="acct_log", now=datetime.now(UTC))

    assert entry.delivery is not None
    assert (entry.delivery.account, entry.delivery.signature) == ("acct_1", "t=1,v1=abc")
    assert (entry.delivery.sha256, entry.delivery.received_at) == (b"\xab" * 32, NOW)
    assert entry.delivery.envelope.redacted == ("data.object.url",)
    assert entry.delivery.envelope.payload == COMPACT[0]


def test_own_line_altered(read: Callable[[bytes], list[str]]) -> None:
    """A payload that was altered after the export is recognised by its hash."""
    altered = own_line().replace(b"livemode", b"livem0de")

    assert read(own_line() + altered) == [
        IDS[0],
        ": line 2 its payload is not the one that was exported: the hash differs",
    ]


@pytest.mark.parametrize(
    "bad",
    [
        b'{"object":"payfold.delivery","account":"","payload":"\xff","payload_sha256":"00"}\n',
        b'{"object":"\xff"}\n',
        b'{"object":"event","id":"\xff"}\n',
        b'[{"object":"\xff"}]\n',
    ],
)
def test_bytes_that_are_no_text(read: Callable[[bytes], list[str]], bad: bytes) -> None:
    """A line with a byte that is no UTF-8 is refused, wherever it is, and those around it are read."""
    first, refused, last = read(own_line() + bad + own_line())

    assert (first, last) == (IDS[0], IDS[0])
    assert refused.startswith((": line 2", ":2"))


@pytest.mark.parametrize("form", ["plain", "gzip", "Zstandard"])
def test_writing(tmp_path: Path, read: Callable[[bytes], list[str]], form: log_writer.Compression) -> None:
    """A log is written in the requested compression, and appears only once it is complete."""
    path = tmp_path / "events"
    with log_writer.writing(path, form) as stream:
        stream.write(NDJSON)
        assert not path.exists()

    assert read(path.read_bytes()) == IDS
    assert (path.read_bytes() == NDJSON) == (form == "plain")
    assert list(tmp_path.glob("*.part")) == []


def test_writing_broken_off(tmp_path: Path) -> None:
    """An interrupted write leaves the previous log unchanged, and no other file."""
    (tmp_path / "events.zst").write_bytes(b"before")

    def write() -> None:
        with log_writer.writing(tmp_path / "events.zst", "Zstandard") as stream:
            stream.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()

    assert [path.name for path in tmp_path.iterdir()] == ["events.zst"]
    assert (tmp_path / "events.zst").read_bytes() == b"before"


def test_reading_is_lazy(tmp_path: Path) -> None:
    """A log larger than memory is read piece by piece, in any layout."""
    element = pretty(EVENTS[0])

    class Endless(io.RawIOBase):
        """An array that never ends."""

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]  # BufferedReader passes this type
            text = (b"[" if not hasattr(self, "begun") else b",") + element
            self.begun = True
            buffer[: len(text)] = text
            return len(text)

    items = layout.items(Lines(io.BufferedReader(Endless())))  # type: ignore[type-var]  # any raw stream will do

    assert [next(items).text for _ in range(200)] == [element] * 200


@pytest.mark.parametrize("laid_out", [msgspec.json.encode, pretty], ids=["one line", "many lines"])
@pytest.mark.parametrize("has_more", [True, False])
def test_a_page_that_is_not_the_last(tmp_path: Path, laid_out: Callable[[object], bytes], *, has_more: bool) -> None:
    """A page of Stripe's list with has_more is read, with a warning that names its place."""
    path = tmp_path / "log"
    path.write_bytes(COMPACT[0] + b"\n" + laid_out({**page(EVENTS), "has_more": has_more}) + b"\n" + COMPACT[0])
    warnings: list[str] = []

    entries = list(reader.read(str(path), account="", now=NOW, warn=warnings.append))

    assert [entry.fault for entry in entries] == [None] * (len(EVENTS) + 2)
    assert warnings == ([f"{path}: line 2: {reader.HAS_MORE}"] if has_more else [])


@pytest.mark.parametrize("kind", ["pre_payment", "standard", "card"])
def test_an_object_with_a_type_of_its_own(read: Callable[[bytes], list[str]], kind: str) -> None:
    """A credit note, a charge's source or an account has an id, a type and a time, but is refused as no event."""
    alone = {"id": "cn_1", "object": "credit_note", "type": kind, "created": 1, "data": {"object": {}}}
    (line,) = read(msgspec.json.encode(alone))

    assert "without its event" in line


def test_a_wrapped_event_in_a_log(read: Callable[[bytes], list[str]]) -> None:
    """Each line with a wrapped event is refused with the place of its event; the other lines are read."""
    wrapped = msgspec.json.encode([{"headers": {}, "body": EVENTS[0]}])
    bridged = msgspec.json.encode({"version": "0", "id": "0f0f", "detail": EVENTS[0]})
    lines = read(b"\n".join([wrapped, COMPACT[0], bridged]))

    assert [IDS[0] if line == IDS[0] else line.split("stands in it at ")[1].split(":")[0] for line in lines] == [
        "body",
        IDS[0],
        "detail",
    ]


def test_a_remark_on_a_name_that_is_no_text(tmp_path: Path) -> None:
    """A line is refused for a name that is no valid text; its remark can be written, and other lines are read."""
    path = tmp_path / "log"
    path.write_bytes(b'{"\\ud800": ' + COMPACT[0] + b"}\n" + COMPACT[0] + b"\n")

    refused, read_well = reader.read(str(path), account="", now=NOW)

    assert refused.fault is not None
    assert log_writer.remark(refused.place, refused.fault).isascii()
    assert read_well.delivery is not None
