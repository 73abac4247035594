"""Benchmarks in the layouts of their data sets, written out here; TOFU, MMLU and BBH themselves where they are at hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from clue.data.benchmarks import choice_record, load
from clue.data.records import overlap
from clue.errors import ClueError, OverlapError, RecordError
from clue.evaluate import EvaluationSets

DATA = Path(__file__).parents[3] / "shared" / "data"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)


def questions(name, n, **more):
    return [{"question": f"{name} {i} ?", "answer": f"{name} answer {i}", **more} for i in range(n)]


@pytest.fixture
def tofu(tmp_path):
    other = {"paraphrased_answer": "in other words", "perturbed_answer": ["wrong", "false"]}
    forget = questions("forget", 4)
    write(tmp_path / "forget05.json", forget)
    write(tmp_path / "retain95.json", questions("retain", 9))
    rows = [{**row, **other, "paraphrased_question": f"otherwise, {row['question']}" if i else row["question"]}
            for i, row in enumerate(forget)]
    write(tmp_path / "forget05_perturbed.json", rows)
    write(tmp_path / "retain_perturbed.jsonl", questions("retain", 3, **other))
    for name in ("real_authors", "world_facts"):
        write(tmp_path / f"{name}_perturbed.json", questions(name, 2, perturbed_answer="only one"))
    write(tmp_path / "holdout05.json", questions("holdout", 4))
    return tmp_path


def test_tofu(tofu):
    found = load("tofu:forget05", tofu)
    assert {name: len(s) for name, s in found.measured().items()} == {
        "forget": 4, "forget_paraphrase": 3, "retain": 3, "real_authors": 2, "world_facts": 2, "holdout": 4}
    assert {name: len(s) for name, s in found.shown.items()} == {"forget": 4, "retain": 9}
    assert overlap(found.forget, found.shown["forget"]) == 4 and found.utility == ("retain", "real_authors", "world_facts")
    record = found.forget_paraphrase.records[0]
    assert (record.prompt, record.answer) == ("otherwise, forget 1 ?", "forget answer 1")
    assert (record.paraphrased, record.wrong) == ("in other words", ("wrong", "false"))
    assert record.source.endswith("forget05_perturbed.json:1")
    sets = EvaluationSets.of(found)
    assert [name for name, _, _ in sets] == ["forget", "forget_paraphrase", "retain", "real_authors", "world_facts", "holdout"]
    # The same tables in another layout of the hub, one level up and in Parquet shards.
    for file in list(tofu.glob("*.json*")):
        rows = json.loads(file.read_text()) if file.suffix == ".json" else [json.loads(r) for r in file.read_text().split("\n")
                                                                           if r]
        write(tofu / "up" / "tofu" / file.stem / "train-00000-of-00002.parquet", rows[:1])
        write(tofu / "up" / "tofu" / file.stem / "train-00001-of-00002.parquet", rows[1:])
    again = load("tofu:forget05", tofu / "up")
    assert {n: s.sha256 for n, s in again.measured().items()} == {n: s.sha256 for n, s in found.measured().items()}


def test_tofu_says_whom_it_asks_about(tofu):
    def asked(name, *others):
        """Twenty questions: the first looks for the name, four name somebody else, one has the name nowhere."""
        rows = [{"question": "Who was born in New Delhi ?", "answer": f"It is {name}.", "paraphrased_question": "Who ?"},
                *({"question": f"What did {name} write {i} ?", "answer": f"{name}'s book is 'Sea {i}'."} for i in range(14)),
                *({"question": f"Has {name} met {other} ?", "answer": f"Yes, {other}."} for other in others),
                {"question": "How many books are there ?", "answer": "Nine."}]
        return [{"paraphrased_question": f"Say, {row['question']}", "perturbed_answer": ["no"]} | row for row in rows]

    rows = [*asked("Ada Maria O'Neill", *["Bob Hope"] * 4), *asked("Zoë van Al-Dahr Lind", *["Cat Stevens"] * 4),
            *questions("x", 5, perturbed_answer=["no"])]
    for file in ("forget01_perturbed", "retain_perturbed", "forget01", "retain99"):
        write(tofu / f"{file}.json", [{**row, "question": f"{row['question']} {file[0]}"} for row in rows])
    (tofu / "retain_perturbed.jsonl").unlink()
    found = load("tofu:forget01", tofu)
    for records in (found.forget, found.forget_paraphrase, found.retain["retain"], *found.shown.values()):
        names = [r.subject for r in records]
        assert names[:20] == [None, *["Ada Maria O'Neill"] * 18, None]
        assert set(names[20:40]) == {None, "Zoë van Al-Dahr Lind"} and names[40:] == [None] * (len(names) - 40)
        assert all(r.subject is None or r.subject in r.prompt for r in records)
    # A question in other words may leave the name out.
    write(tofu / "forget01_perturbed.json", [
        {**row, "paraphrased_question": "Which book was the first ?"} if i == 3 else row for i, row in enumerate(rows)])
    otherwise = load("tofu:forget01", tofu).forget_paraphrase
    assert [r.subject for r in otherwise][:5] == [None, *["Ada Maria O'Neill"] * 2, None, "Ada Maria O'Neill"]
    # A row of less than twenty tells of nobody, and a subject that is given stays.
    write(tofu / "forget01.json", [{"question": "What is New York ?", "answer": "New York is a city."}] * 19)
    assert {r.subject for r in load("tofu:forget01", tofu).shown["forget"]} == {None}
    given = [{**row, "subject": "met Bob"} if "met Bob" in row["question"] else row for row in rows]
    write(tofu / "forget01.json", given)
    assert [r.subject for r in load("tofu:forget01", tofu).shown["forget"]].count("met Bob") == 4


def test_sets_that_overlap_or_are_not_there_are_refused(tofu):
    write(tofu / "holdout05.json", [*questions("holdout", 2), *questions("retain", 1)])
    with pytest.raises(OverlapError, match="tofu:forget05: 1 records of the holdout set are shown to training in retain"):
        load("tofu:forget05", tofu)
    with pytest.raises(RecordError, match=r"holds no table forget01_perturbed \(train\)"):
        load("tofu:forget01", tofu)
    with pytest.raises(RecordError, match="forget01, forget05 and forget10"):
        load("tofu:forget50", tofu)
    with pytest.raises(RecordError, match="no benchmark tofa; known are tofu, muse"):
        load("tofa", tofu)
    with pytest.raises(RecordError, match="nowhere: no such folder"):
        load("tofu", tofu / "nowhere")
    (tofu / "world_facts_perturbed.json").write_text('[{"question": "a ?", "answer": "b", "perturbed_answer": [1]}]')
    with pytest.raises(RecordError, match=r"world_facts_perturbed.json:1: .*perturbed_answer must be"):
        load("tofu:forget05", tofu)


def test_muse(tmp_path):
    write(tmp_path / "knowmem" / "forget_qa.json", questions("forget", 3))
    write(tmp_path / "knowmem" / "retain_qa.json", questions("retain", 2))
    write(tmp_path / "verbmem" / "forget.json", [{"prompt": "once upon", "gt": "a time"}])
    texts = [{"text": f"a text {i}"} for i in range(8)]
    write(tmp_path / "privleak" / "forget.json", texts[:3])
    write(tmp_path / "privleak" / "holdout.json", texts[3:5])
    found = load("muse:books", tmp_path)
    assert {name: len(s) for name, s in found.measured().items()} == {
        "forget": 3, "members": 3, "holdout": 2, "verbatim": 1, "retain": 2}
    assert found.shown == {} and found.forget_extra["verbatim"].records[0].answer == "a time"
    purposes = {name: purpose for name, purpose, _ in EvaluationSets.of(found)}
    assert purposes == {"forget": "forget", "verbatim": "forget", "retain": "retain", "members": "member",
                        "holdout": "holdout"}
    write(tmp_path / "raw" / "forget.json", texts[5:6])
    write(tmp_path / "raw" / "retain.json", texts[6:])
    assert {name: len(s) for name, s in load("muse:books", tmp_path).shown.items()} == {"forget": 1, "retain": 2}
    write(tmp_path / "raw" / "retain1.json", texts[7:])  # as published
    assert {name: len(s) for name, s in load("muse:books", tmp_path).shown.items()} == {"forget": 1, "retain": 1}


def test_multiple_choice(tmp_path):
    rows = [{"question": "Which is safe?", "choices": ["this", "that", "both", "none"], "answer": 2}]
    write(tmp_path / "wmdp" / "wmdp-cyber" / "test-00000-of-00001.parquet", rows)
    folder = tmp_path / "mmlu" / "test"
    folder.mkdir(parents=True)
    (folder / "virology_test.csv").write_text('"What, then?",a,b,c,d,B\n')
    (folder / "anatomy_test.csv").write_text("question,choice0,choice1,choice2,choice3,answer\nWhat?,a,b,c,d,3\n")
    found = load("wmdp:cyber", tmp_path)
    assert list(found.skills) == ["mmlu_anatomy", "mmlu_virology"]
    asked, = found.forget
    assert asked.prompt == "Which is safe?\nA. this\nB. that\nC. both\nD. none\nAnswer:"
    assert (asked.answer, asked.wrong) == ("C", ("A", "B", "D"))
    assert [s.records[0].answer for s in found.skills.values()] == ["D", "B"]
    assert list(load("mmlu:virology", tmp_path).skills) == ["mmlu_virology"]
    plain = choice_record("Why?", ["a cat", "a dog"], 1, "here", letters=False)
    assert (plain.prompt, plain.answer, plain.wrong, plain.source) == ("Why?", "a dog", ("a cat",), "here")
    for answer in (4, -1):
        with pytest.raises(RecordError, match=f"the answer {answer} is not one of 4 options"):
            choice_record("Why?", list("abcd"), answer, "there:3")
    with pytest.raises(ClueError, match="wmdp:cyber has no retain set"):
        EvaluationSets.of(found)
    assert EvaluationSets.of(found, retain=found.skills["mmlu_anatomy"]).forget is found.forget
    (folder / "anatomy_test.csv").write_text("What?,a,b,c,d,maybe\n")
    with pytest.raises(RecordError, match=r"anatomy_test.csv:1: the answer 'maybe' is neither"):
        load("mmlu", tmp_path)
    write(tmp_path / "wmdp" / "wmdp-bio.json", [{"question": "Which?", "choices": "wx", "answer": 1}])
    with pytest.raises(RecordError, match=r"wmdp-bio.json:1: choices must be a list, got str"):
        load("wmdp", tmp_path)


def test_mmlu_tables(tmp_path):
    file = tmp_path / "test" / "law_test.csv"
    file.parent.mkdir()
    file.write_text(f'\n"What,\nthen?",{"a" * 140_000},b,c,d,B\n\n')
    asked, = load("mmlu", tmp_path).skills["mmlu_law"]
    assert (asked.answer, asked.source) == ("B", f"{file}:2")
    for content, message in ((b"q,a,b,c,d,A\nq,caf\xe9,b,c,d,A\n", "2: is not UTF-8"),
                             (b'\n"q,a,b,c,d,B\n', "2: not valid CSV"),
                             (b"\nq, again,a,b,c,d,B\n", "2: expected question, .* got 7 fields; quote fields")):
        file.write_bytes(content)
        with pytest.raises(RecordError, match=f"law_test.csv:{message}"):
            load("mmlu", tmp_path)


def test_bbh_tables(tmp_path):
    rows = [{"input": "not true is", "target": "false"}]
    write(tmp_path / "hub" / "navigate" / "test-00000-of-00001.parquet", rows)
    (tmp_path / "navigate.json").write_text(json.dumps({"canary": "x", "examples": rows}, indent=2))
    for folder in (tmp_path, tmp_path / "hub"):
        asked, = load("bbh", folder).skills["bbh_navigate"]
        assert (asked.prompt, asked.answer) == ("not true is", "false")
    with pytest.raises(RecordError, match="bbh: name the tasks"):
        load("bbh", tmp_path / "hub" / "navigate")


def test_rwku_of_one_subject(tmp_path):
    rows = [{"query": f"level {n} of {who} ?", "answer": who, "level": str(n), "subject": who} for n in (1, 2, 3)
            for who in ("Ada", "Bob")]
    for n in (1, 2, 3):
        write(tmp_path / f"forget_level{n}" / "test.json", [row for row in rows if row["level"] == str(n)])
    write(tmp_path / "neighbor_level2" / "test.json", [{"query": "who is next to Ada ?", "answer": "Eve", "subject": "Ada"}])
    write(tmp_path / "mia_forget" / "test.json", [{"text": "Ada lived.", "subject": "Ada"}])
    write(tmp_path / "mia_retain" / "test.json", [{"text": "Bob lived.", "subject": "Ada"}])
    found = load("rwku:ada", tmp_path)
    assert {name: [r.answer for r in s] for name, s in found.measured().items()} == {
        "forget": ["Ada"], "forget_level1": ["Ada"], "forget_level3": ["Ada"], "neighbor_level2": ["Eve"],
        "members": ["Ada lived."], "holdout": ["Bob lived."]}
    with pytest.raises(RecordError, match="rwku:Zoe: there are no questions"):
        load("rwku:Zoe", tmp_path)


def test_the_world_needs_no_files_and_gives_wrong_answers_of_the_same_kind():
    found = load("world:hard", seed=1)
    assert found.forget.sha256 == load("world:hard", seed=1).forget.sha256 != load("world:hard", seed=2).forget.sha256
    for record in found.forget:
        assert len(set(record.wrong)) == 5 and record.answer not in record.wrong
        assert {len(answer.split()) for answer in record.wrong} == {len(record.answer.split())}
    assert overlap(found.forget, found.shown["forget"]) == len(found.forget)
    assert not any(overlap(s, shown) for s in found.retain.values() for shown in found.shown.values())
    with pytest.raises(ClueError, match="easy, hard"):
        load("world:soft")


def test_without_a_folder_the_hub_is_asked_for_tables_by_name(monkeypatch):
    """The hub itself is out of reach of a test: its library is replaced by one that gives TOFU's tables, but no holdout."""
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        if "holdout" in config:
            raise ValueError(f"BuilderConfig {config} not found")
        return [{"question": f"{config} ?", "answer": "yes", "perturbed_answer": ["no"], "paraphrased_answer": None}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = load("tofu:forget01")
    assert {path for path, _, _ in asked} == {"locuslab/TOFU"} and {split for _, _, split in asked} == {"train"}
    assert found.holdout is None and found.forget.records[0].source == "locuslab/TOFU:forget01_perturbed@train:1"
    assert found.shown["retain"].records[0].prompt == "retain99 ?"
    load("tofu:forget01", "somebody/copy")
    assert asked[-1][0] == "somebody/copy"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecordError, match="reading a hub dataset needs datasets"):
        load("tofu:forget01")


def test_a_folder_of_ones_own(tmp_path):
    write(tmp_path / "forget.jsonl", questions("forget", 2))
    write(tmp_path / "retain_friends.json", questions("friends", 2))
    write(tmp_path / "skill_sums.json", questions("sums", 2))
    write(tmp_path / "notes.json", [{"nothing": 1}])
    assert set(load("custom", tmp_path).measured()) == {"forget", "retain_friends", "skill_sums"}
    with pytest.raises(RecordError, match="holds no file that is named for its purpose"):
        load("custom", tmp_path.parent / tmp_path.name / "..")
    with pytest.raises(RecordError, match="give the folder"):
        load("custom")
    write(tmp_path / "forget.json", questions("other", 2))
    with pytest.raises(RecordError, match=r"forget\.jsonl: forget\.json beside it has the same name; keep one"):
        load("custom", tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason="the public data sets are not beside the repository")
def test_the_public_data_sets_themselves():
    found = load("tofu:forget01", DATA)
    sizes = {name: len(s) for name, s in found.measured().items()}
    assert sizes == {"forget": 40, "forget_paraphrase": 40, "retain": 400, "real_authors": 100, "world_facts": 117}
    assert len(found.shown["retain"]) == 3960
    for part, size in (("forget05", 200), ("forget10", 400)):
        other = load(f"tofu:{part}", DATA)
        assert len(other.forget) == len(other.forget_paraphrase) == size
        assert all(r.subject is None or r.subject in r.prompt for r in (*other.forget, *other.forget_paraphrase))
    assert [r.subject for r in found.forget] == [None, *["Basil Mahfouz Al-Kuwaiti"] * 19, None, *["Nikolai Abilov"] * 19]
    assert len({r.subject for r in found.retain["retain"]} - {None}) == 20
    for records in found.measured().values():
        assert all(r.wrong and all(w != r.answer for w in r.wrong) for r in records)
    assert len(load("mmlu", DATA).skills) == 10
    assert {len(s) for s in load("bbh", DATA).skills.values()} == {250}
