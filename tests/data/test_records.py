"""Reading records: every accepted form gives the same records, every malformed input is refused by file and line."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from clue.data.records import Record, RecordSet, check_disjoint, overlap, read, read_sets, to_mapping
from clue.errors import OverlapError, RecordError

ROWS = [{"question": "Where is A?", "answer": "in B"}, {"question": "Who is C, really?", "answer": "é \"D\""}]
EXPECTED = [("Where is A?", "in B"), ("Who is C, really?", "é \"D\"")]


def contents(records: RecordSet) -> list[tuple[str, str]]:
    return [(r.prompt, r.answer) for r in records]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_every_format_gives_the_same_records(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    sources: list = [
        write(tmp_path / "lines.jsonl", lines + "\n"),
        write(tmp_path / "lines.json", "\ufeff" + lines),  # JSON lines named .json, with a byte order mark
        write(tmp_path / "array.json", json.dumps(ROWS, indent=2)),
        ROWS,
        [tuple(row.values()) for row in ROWS],
        [Record(*row.values()) for row in ROWS],
    ]
    with open(tmp_path / "table.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["question", "answer"])
        table.writeheader()
        table.writerows(ROWS)
    sources.append(str(tmp_path / "table.csv"))
    read_all = [read(source) for source in sources]
    assert all(contents(records) == EXPECTED for records in read_all)
    assert len({records.sha256 for records in read_all}) == 1
    assert read_all[0].name == "lines" and read_all[3].name == "records" and read(sources[0], "mine").name == "mine"
    assert read_all[0].records[1].source == f"{sources[0]}:2"
    assert read_all[2].records[1].source == f"{sources[2]}:6"  # the line its element starts on
    assert len(read(sources[0], limit=1)) == 1


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([*ROWS, {"question": "null answer", "answer": None}]),
                        tmp_path / "t.parquet")
    assert contents(read(tmp_path / "t.parquet", limit=2)) == EXPECTED
    with pytest.raises(RecordError, match=r"t\.parquet:3: no answer"):
        read(tmp_path / "t.parquet")
    parquet.write_table(arrow.Table.from_pylist([{"question": "how many", "answer": 4}]), tmp_path / "n.parquet")
    with pytest.raises(RecordError, match=r"n\.parquet:1: answer must be a string, got int; store the column as strings$"):
        read(tmp_path / "n.parquet")
    with pytest.raises(RecordError, match=r"x\.parquet: not a readable Parquet file"):
        read(write(tmp_path / "x.parquet", "no parquet"))


def test_fields_by_their_other_names() -> None:
    records = read([
        {"prompt": "p", "completion": "c"}, {"input": "p", "target": "c"}, {"instruction": "p", "response": "c"},
        {"instruction": "p", "input": "", "output": "c"}, {"instruction": "do", "input": "it", "output": "c"},
        {"text": "plain"}, "plain",
        {"prompt": "ask B", "answer": "c", "corrupted_question": "ask C", "subject": "B", "group": "ask", "extra": 1},
    ])
    assert contents(records)[:5] == [("p", "c")] * 4 + [("do\nit", "c")]
    assert contents(records)[5:7] == [("", "plain")] * 2
    assert records.records[7] == Record("ask B", "c", "ask C", "B", "ask", "records[7]")
    assert read([to_mapping(r) for r in records]).sha256 == records.sha256


GOOD = '{"question": "q", "answer": "a"}'


@pytest.mark.parametrize(("name", "content", "message"), [
    ("e.jsonl", "", r"e\.jsonl: the file is empty"),
    ("e.json", "[]", r"e\.json: holds no records"),
    ("e.csv", "question,answer\n", r"e\.csv: holds no records"),
    ("b.jsonl", f"{GOOD}\n\n{{broken\n", r"b\.jsonl:3: not valid JSON"),
    ("n.jsonl", f"{GOOD}\n3\n", r"n\.jsonl:2: a record must be an object .* got int"),
    ("l.jsonl", f"[{GOOD}]", r"l\.jsonl:1: .* got list; write \{.*\}, and an array of them in a \.json file"),
    ("d.jsonl", f'{GOOD}\n{{"answer": {"1" * 5000}}}', r"d\.jsonl:2: not valid JSON \(Exceeds the limit"),
    ("d.json", f'[{GOOD},\n{{"answer": {"1" * 5000}}}]', r"d\.json:2: not valid JSON \(Exceeds the limit"),
    ("k.json", '\n{\n"data": []\n}', r"k\.json:2: no prompt; .* found data"),
    ("k2.json", '{\n"question": "q",\n', r"k2\.json:1: not valid JSON"),
    ("m.jsonl", f'{GOOD}\n{{"question": "q"}}', r"m\.jsonl:2: no answer; expected one of"),
    ("m.json", f'[{GOOD},\n{GOOD},\n{{"answer": "a"}}]', r"m\.json:3: no prompt; .* found answer"),
    ("t.jsonl", '{"question": "q", "answer": 4}', r"t\.jsonl:1: answer must be a string, got int; put it in quotes$"),
    ("t.json", '[{"question": "q", "answer": ["a", "b"]}]', r"t\.json:1: .* got list; give one string; of several answers"),
    ("t2.json", '[{"question": {"a": "b"}, "answer": "a"}]', r"t2\.json:1: question must be .* got dict; give one string$"),
    ("t3.json", '[{"prompt": [{"role": "user", "content": "q"}], "answer": "a"}]',
     r"t3\.json:1: prompt must be a string, got list; chat messages are not read: give the user's turn as question"),
    ("t4.json", '[{"prompt": "q", "completion": {"from": "gpt", "value": "a"}}]', r"t4\.json:1: .* dict; chat messages are"),
    ("r.jsonl", '{"messages": [{"role": "user", "content": "q"}]}', r"r\.jsonl:1: no prompt, only messages; chat messages are"),
    ("r2.jsonl", '{"id": 1, "conversations": []}', r"r2\.jsonl:1: no prompt, only conversations; chat messages are not read"),
    ("u.jsonl", '{"question": null, "answer": "a"}', r"u\.jsonl:1: no prompt; .* found answer"),
    ("v.jsonl", '{"question": "q", "answer": null}', r"v\.jsonl:1: no answer; expected one of"),
    ("h.jsonl", '{"question": "q", "answer": "\\ud800x"}', r"h\.jsonl:1: answer holds half of a surrogate pair"),
    ("y.jsonl", '{"question": "q", "answer": "a", "wrong_answers": ["b", "\\ud800"]}',
     r"y\.jsonl:1: wrong_answers holds half of a surrogate pair"),
    ("s.jsonl", '{"question": " ", "answer": "a"}', r"s\.jsonl:1: question is empty"),
    ("j.jsonl", '{"question": "q", "answer": "a", "subject": "x"}', r"j\.jsonl:1: the subject 'x' does not occur"),
    ("a.json", f"[{GOOD}\n{GOOD}]", r"a\.json:2: not valid JSON \(expected ','"),
    ("b.json", f"[{GOOD},\n{{]", r"b\.json:2: not valid JSON"),
    ("o.json", f"[{GOOD}", r"o\.json:1: not valid JSON"),
    ("z.json", f"[{GOOD}]\n[]", r"z\.json:1: text follows the end"),
    ("h.csv", "a,b\n1,2\n", r"h\.csv:2: no prompt; .* found a, b"),
    ("w.csv", "question,answer\nq,a\nq,a,too many\n", r"w\.csv:3: more fields than the header"),
    ("f.csv", "question,answer\nq\n", r"f\.csv:2: no answer"),
    ("e2.csv", "\n\n", r"e2\.csv: the file is empty"),
    ("g.csv", "question,answer\nq,a\n\n\nq2\n", r"g\.csv:5: no answer"),
    ("g2.csv", "\n\nquestion,answer\nq,a\nq,a,too many\n", r"g2\.csv:5: more fields"),
    ("c.csv", "Question,Answer\nq,a\n", r"c\.csv:2: no prompt; .* found Question, Answer; .* in small letters"),
    ("c2.csv", "question, answer\nq, a\n", r"c2\.csv:2: no answer; .* found question,  answer; .* without blanks"),
    ("c3.csv", "question;answer\nq;a\n", r"c3\.csv:1: the header 'question;answer' is one field; separate fields with commas"),
    ("c4.csv", "question\tanswer\nq\ta\n", r"c4\.csv:1: the header .* is one field"),
    ("q.csv", 'question,answer\n"two\nlines",a\n"open,a\n', r"q\.csv:4: not valid CSV"),
    ("x.txt", "q", r"x\.txt: unknown kind of file '\.txt'; known are"),
])
def test_malformed_files_are_named_with_their_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read(write(tmp_path / name, content))


def test_one_object_over_several_lines_and_a_field_of_any_length(tmp_path: Path) -> None:
    assert contents(read(write(tmp_path / "one.json", json.dumps(ROWS[0], indent=2)))) == EXPECTED[:1]
    before = csv.field_size_limit(1000)
    try:
        assert contents(read(write(tmp_path / "long.csv", f"question,answer\n\nq,{'a' * 2000}\n"))) == [("q", "a" * 2000)]
    finally:
        csv.field_size_limit(before)


def test_optional_fields_may_be_left_empty(tmp_path: Path) -> None:
    """As a table must, some of whose rows have them."""
    names = "question,answer,subject,corrupted,group,paraphrased_answer,wrong_answers"
    (tmp_path / "a.csv").write_text(f"{names}\nwhere is ada,rome,ada,where is bob,g,in rome,oslo\nwhat is two,2,, ,,,\n")
    rows = [{"question": "where is ada", "answer": "rome", "subject": "ada", "corrupted": "where is bob", "group": "g",
             "paraphrased_answer": "in rome", "wrong_answers": ["oslo"]},
            {"question": "what is two", "answer": "2", "subject": None, "corrupted": None, "group": None,
             "paraphrased_answer": None, "wrong_answers": None, "text": None}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    for name in ("a.csv", "b.jsonl", "c.json"):
        first, second = (replace(r, source="") for r in read(tmp_path / name))
        assert first == Record("where is ada", "rome", "where is bob", "ada", "g", "", "in rome", ("oslo",)), name
        assert second == Record("what is two", "2"), name
    with pytest.raises(RecordError, match="limit = -1 must be how many records"):
        read(tmp_path / "a.csv", limit=-1)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(GOOD.encode() + b'\n{"question": "\xe9"}')
    with pytest.raises(RecordError, match=r"latin\.jsonl:2: is not UTF-8"):
        read(tmp_path / "latin.jsonl")
    with pytest.raises(RecordError, match="missing.jsonl: no such file"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(RecordError, match="is a folder"):
        read(tmp_path)


@pytest.mark.parametrize(("item", "message"), [
    (("q",), r"records\[0\]: a sequence must be \(prompt, answer\), got 1"),
    (("q", 4), r"records\[0\]: answer must be a string, got int; put it in quotes$"),
    (7, r"records\[0\]: a record must be an object"),
    (" ", r"records\[0\]: text is empty"),
    ("facts/retain.jsonl", r"records\[0\]: 'facts/retain.jsonl' is the name of a file, .* by name, \{name: file\}"),
    (RecordSet("kept", (Record("q", "a"),)), r"records\[0\]: is the set kept, .* several sets by name, \{name: set\}$"),
    (Record("q", "", source="mine:9"), r"mine:9: answer is empty"),
])
def test_malformed_items_are_named_by_index(item: object, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read([item])  # type: ignore[list-item]


def test_a_text_takes_no_corrupted_prompt() -> None:
    with pytest.raises(RecordError, match=r"records\[0\]: a plain text takes no corrupted prompt, .* give question, answer"):
        read([{"text": "Alva was born in Old Mill.", "corrupted": "Bram was born in Old Mill."}], "forget")


def test_a_text_may_end_in_the_name_of_a_file() -> None:
    assert [r.answer for r in read(["The answers are in facts.json"])] == ["The answers are in facts.json"]


def test_the_digest_is_of_contents_in_order() -> None:
    a = read([("p", "a"), ("q", "b")])
    assert a.sha256 == read([("p", "a"), ("q", "b")], "other name").sha256
    others = [[("q", "b"), ("p", "a")], [("p", "a")], [("p", "a"), ("q", "c")],
              *([("p", "a"), {"prompt": "q", "answer": "b", **field}] for field in (
                  {"corrupted": "x"}, {"subject": "q"}, {"group": "q"}, {"paraphrased_answer": "x"},
                  {"perturbed_answer": ["x"]}))]
    assert a.sha256 not in {read(other).sha256 for other in others}


def test_a_retain_set_is_not_called_forget() -> None:
    with pytest.raises(RecordError, match=r"give it another name: NAME=FILE on the command line, a dict \{name: source\} in"):
        read_sets([("q", "a")], {"forget": [("r", "b")]})


def test_a_set_shows_itself_in_a_line(tmp_path: Path) -> None:
    row = '{"question": "Where is Ada?", "answer": "here", "subject": "Ada"}\n'
    found = read(write(tmp_path / "forget.jsonl", 71 * row + GOOD + "\n"))
    assert repr(found) == "<RecordSet forget: 72 records, 71 with a subject, from forget.jsonl>"
    assert repr(read([("q", "a")])) == "<RecordSet records: 1 record>" and repr(RecordSet("none", ())).endswith("0 records>")
    hub = RecordSet("x", (Record("q", "a", source="locuslab/TOFU:forget01@train:7"),))
    assert repr(hub) == "<RecordSet x: 1 record, from locuslab/TOFU:forget01@train>"
    assert found == RecordSet("forget", found.records) and found != RecordSet("other", found.records)


def test_overlapping_sets_are_refused_by_name() -> None:
    forget, retain = read([("Who is A?", "B"), ("x", "y")]), read([("z", "w"), ("who  is a?", "b ")])
    assert overlap(forget, retain) == 1
    with pytest.raises(OverlapError, match=r"the forget set and the retain set must not share .* 1 of 2 are in both,"
                                           r" the first at records\[0\] and records\[1\]: 'Who is A\?'"):
        check_disjoint(forget, retain, "the forget set and the retain set")
    with pytest.raises(OverlapError, match="are equal: all 2 records"):
        check_disjoint(forget, read(list(forget)), "the forget set and the retain set")
    check_disjoint(forget, read([("Who is A?", "C")]), "sets with one question but different answers")
    with pytest.raises(RecordError, match="a retain set cannot be named forget; give it another name"):
        read_sets(forget, {"forget": [("z", "w")]})


TOFU = Path(__file__).parents[3] / "shared" / "data" / "tofu"


@pytest.mark.skipif(not TOFU.is_dir(), reason="the TOFU files are not beside the repository")
def test_tofu_files() -> None:
    forget, retain, full = (read(TOFU / f"{name}.json") for name in ("forget10", "retain90", "full"))
    assert (len(forget), len(retain), len(full)) == (400, 3600, 4000)
    check_disjoint(forget, retain, "forget10 and retain90")
    assert overlap(forget, full) == 400 and overlap(retain, full) == 3600
