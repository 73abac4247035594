"""Public benchmarks as record sets: what is localized and trained on, and what is measured.

:func:`load` takes ``name[:part]`` and the place of the data: a folder in the layout of the data set's repository on the hub
(JSON, JSON Lines, CSV or Parquet files), a folder of such folders by name, or nothing, which asks the hub itself (with the
extra ``datasets``). The embedded world needs no data, and ``custom`` is a folder of one's own files.

    tofu[:forget01|forget05|forget10]   TOFU (Maini et al., 2024): fictitious authors, who become their questions' subjects
    muse[:news|books]                   MUSE (Shi et al., 2024): texts; knowledge, verbatim memory, privacy
    wmdp[:bio|cyber|chem]               WMDP (Li et al., 2024): hazardous knowledge, multiple choice
    mmlu[:SUBJECT,...]                  MMLU (Hendrycks et al., 2021): general knowledge, multiple choice
    bbh[:TASK,...]                      BIG-Bench Hard (Suzgun et al., 2022): reasoning
    rwku[:SUBJECT]                      RWKU (Jin et al., 2024): famous people
    world[:easy|hard]                   the embedded world of this package
    custom                              forget, retain, forget_paraphrase, holdout, retain_NAME, skill_NAME files
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import listed
from ..errors import OverlapError, RecordError
from .records import SUFFIXES, Record, RecordSet, csv_rows, make_record, overlap, read, read_rows


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark measures on, and what it shows to localization and training; anything may be missing.

    Attributes:
        name: as :func:`load` was asked for it.
        forget: what must be forgotten; ``forget_extra`` more of it, by name; ``forget_paraphrase`` the same facts asked
            otherwise.
        retain: what must stay, by name, the headline first.
        skills: general skills by name.
        members, holdout: the two sides of privacy attacks; ``members`` is None where they are the forget set.
        utility: names of the sets of the benchmark's model utility.
        shown: the sets for localization and training: ``forget``, and retain sets by name; empty where the benchmark only
            measures.
    """

    name: str
    forget: RecordSet | None = None
    forget_extra: Mapping[str, RecordSet] = field(default_factory=dict)
    forget_paraphrase: RecordSet | None = None
    retain: Mapping[str, RecordSet] = field(default_factory=dict)
    skills: Mapping[str, RecordSet] = field(default_factory=dict)
    members: RecordSet | None = None
    holdout: RecordSet | None = None
    utility: tuple[str, ...] = ()
    shown: Mapping[str, RecordSet] = field(default_factory=dict)

    def measured(self) -> dict[str, RecordSet]:
        """Every set that is measured, by name."""
        single = {"forget": self.forget, "forget_paraphrase": self.forget_paraphrase, "members": self.members,
                  "holdout": self.holdout}
        return {**{name: s for name, s in single.items() if s is not None}, **self.forget_extra, **self.retain, **self.skills}


def load(name: str, data: str | Path | None = None, *, seed: int = 0) -> Benchmark:
    """Read a benchmark, as the module's docstring lists them; ``seed`` is the world's.

    Raises:
        RecordError: there is no such benchmark or part, its files are not where they should be, or a row is malformed.
        OverlapError: its holdout set shares records with what it shows to training.
    """
    kind, _, part = name.partition(":")
    if kind not in _LOADERS:
        raise RecordError(f"there is no benchmark {kind}; known are {', '.join(_LOADERS)}")
    benchmark = replace(_LOADERS[kind](part, data, seed), name=name)
    for shown in benchmark.shown.values():
        shared = overlap(benchmark.holdout, shown) if benchmark.holdout is not None else 0
        if shared:
            raise OverlapError(f"{name}: {shared} records of the holdout set are shown to training in {shown.name}: remove"
                               " them from one of the two")
    return benchmark


# --- where the data is ----------------------------------------------------------------------------------------------


class _Tables:
    """The tables of one data set: configurations with splits, as the hub has them, in files or on the hub."""

    def __init__(self, name: str, data: str | Path | None, hub: str) -> None:
        self.hub = hub
        self.folder: Path | None = None
        if data is None:
            return
        if Path(data).is_dir():
            self.folder = Path(data) / name if (Path(data) / name).is_dir() else Path(data)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(data)) and not Path(data).exists():
            self.hub = str(data)  # somebody's copy of the data set
        else:
            raise RecordError(f"{data}: no such folder; give the folder of the data set {hub}, or leave it out to ask the hub")

    def files(self, config: str, split: str) -> list[Path]:
        """The files of a table, in the layouts that data sets on the hub have; none where there is no such table."""
        if self.folder is None:
            return []
        stems = (config, f"{config}/{split}", f"{config}/{split}-*", f"{config}/{config}_{split}", f"{config}_{split}",
                 f"{split}/{config}", f"{split}/{config}_{split}", f"data/{config}/{split}-*", f"data/{config}",
                 f"data/{config}/{split}", f"{split}-*", f"data/{split}-*", split)
        last = len(stems) - 3  # these name no configuration: for data sets that have only one
        for i, stem in enumerate(stems):
            if i >= last and config != "default":
                break
            found = sorted(f for suffix in SUFFIXES for f in self.folder.glob(stem + suffix))
            if found:
                return found
        return []

    def has(self, config: str, split: str) -> bool:
        """Whether there are files of a table. Of the hub it is not known before it is asked."""
        return bool(self.files(config, split))

    def rows(self, config: str, split: str) -> Iterator[tuple[Mapping[str, Any], str]]:
        """The rows of a table, each with where it stands."""
        files = self.files(config, split)
        if not files and self.folder is not None:
            raise RecordError(f"{self.folder}: holds no table {config} ({split}): expected {config}.json, {config}/{split}"
                              f".parquet or the like, as in the data set {self.hub}")
        sources: Sequence[str | Path] = files or [f"{self.hub}:{config}@{split}"]
        for source in sources:
            for row, where in read_rows(source):
                if not isinstance(row, Mapping):
                    raise RecordError(f"{where}: a row must be an object with named fields, got {type(row).__name__}")
                inner = row.get("examples")
                if isinstance(inner, list):  # BIG-Bench: one object that holds all rows
                    yield from ((r, f"{where}, example {i}") for i, r in enumerate(inner, 1))
                else:
                    yield row, where

    def optional(self, config: str, split: str) -> list[tuple[Mapping[str, Any], str]]:
        """The rows of a table that need not be there."""
        if self.folder is not None:
            return list(self.rows(config, split)) if self.has(config, split) else []
        try:
            return list(self.rows(config, split))
        except RecordError as error:
            if "cannot be loaded" in str(error):
                return []
            raise


def _set(name: str, rows: Sequence[tuple[Mapping[str, Any], str]] | Iterator[tuple[Mapping[str, Any], str]],
         **fields: str) -> RecordSet:
    """Records from rows, whose fields are renamed as said: ``question="query"``."""
    records = []
    for row, where in rows:
        missing = [there for there in fields.values() if there not in row]
        if missing:
            raise RecordError(f"{where}: there is no field {missing[0]}; found {', '.join(map(str, row)) or 'none'}")
        given = {wanted: row[there] for wanted, there in fields.items()} if fields else row
        records.append(make_record(given, where))
    if not records:
        raise RecordError(f"{name}: no record is left; check the part of the benchmark that was asked for")
    return RecordSet(name, tuple(records))


def choice_record(question: str, options: Sequence[str], answer: int, where: str, *, letters: bool = True) -> Record:
    """A multiple choice question as a record: the options are listed and a letter is the answer (as MMLU and WMDP are
    asked), or the question stands alone and the answer is the option's own text.

    Raises:
        RecordError: the answer is not one of the options, or there are fewer than two of them.
    """
    if not 0 <= answer < len(options) or len(options) < 2:
        raise RecordError(f"{where}: the answer {answer} is not one of {len(options)} options")
    texts = [str(option) for option in options]
    if letters:
        names = [chr(ord("A") + i) for i in range(len(texts))]
        options_text = "".join(f"\n{name}. {text}" for name, text in zip(names, texts, strict=True))
        question, texts = f"{question.strip()}{options_text}\nAnswer:", names
    wrong = tuple(text for i, text in enumerate(texts) if i != answer)
    return make_record({"question": question, "answer": texts[answer], "wrong_answers": wrong}, where)


def _choices(name: str, rows: Iterator[tuple[Mapping[str, Any], str]] | Sequence[tuple[Mapping[str, Any], str]]) -> RecordSet:
    """Rows of ``question``, ``choices`` (a list) and ``answer`` (its index or letter)."""
    records = []
    for row, where in rows:
        try:
            question, options, answer = str(row["question"]), row["choices"], row["answer"]
        except (KeyError, TypeError):
            raise RecordError(f"{where}: a multiple choice question needs question, choices and answer; found"
                              f" {', '.join(map(str, row))}") from None
        if not isinstance(options, (list, tuple)):
            raise RecordError(f"{where}: choices must be a list, got {type(options).__name__}; write the options as"
                              ' ["this", "that"]')
        records.append(choice_record(question, options, _index(answer, where), where))
    if not records:
        raise RecordError(f"{name}: there is no question; check the part of the benchmark that was asked for")
    return RecordSet(name, tuple(records))


def _index(answer: Any, where: str) -> int:
    text = str(answer).strip()
    if len(text) == 1 and "A" <= text <= "J":
        return ord(text) - ord("A")
    if text.isdigit():
        return int(text)
    raise RecordError(f"{where}: the answer {answer!r} is neither the number nor the letter of an option")


# --- the benchmarks -------------------------------------------------------------------------------------------------


def _tofu(part: str, data: str | Path | None, seed: int) -> Benchmark:
    part = part or "forget10"
    if part not in ("forget01", "forget05", "forget10"):
        raise RecordError(f"tofu:{part}: the parts of TOFU are forget01, forget05 and forget10")
    share = int(part.removeprefix("forget"))
    tables = _Tables("tofu", data, "locuslab/TOFU")
    rows = _named(tables.rows(f"{part}_perturbed", "train"))
    asked = [_asked(row, str(other), where) for row, where in rows
             if (other := row.get("paraphrased_question")) and other != row.get("question")]
    holdout = tables.optional(f"holdout{share:02d}", "train")
    skills = {name: _set(name, tables.rows(f"{name}_perturbed", "train")) for name in ("real_authors", "world_facts")}
    return Benchmark(
        "", forget=_set("forget", rows), forget_paraphrase=_set("forget_paraphrase", asked) if asked else None,
        retain={"retain": _set("retain", _named(tables.rows("retain_perturbed", "train")))}, skills=skills,
        holdout=_set("holdout", holdout) if holdout else None, utility=("retain", *skills),
        shown={"forget": _set("forget", _named(tables.rows(part, "train"))),
               "retain": _set("retain", _named(tables.rows(f"retain{100 - share}", "train")))})


#: TOFU asks so many questions of each author, in a row.
_PER_AUTHOR = 20
_WORD = r"[^\W\d_][\w\-]*(?:['\u2019](?!s\b)[\w\-]+)*"
_WORDS = re.compile(f"{_WORD}(?: {_WORD})+")


def _named(rows: Iterable[tuple[Mapping[str, Any], str]]) -> list[tuple[Mapping[str, Any], str]]:
    """TOFU's rows with the author as ``subject`` where the question names them. The data does not say who it is about: an
    author is who nearly all of twenty questions and answers in a row name. Subjects that are given are left."""
    rows = list(rows)
    named: list[tuple[Mapping[str, Any], str]] = []
    for first in range(0, len(rows), _PER_AUTHOR):
        block = rows[first:first + _PER_AUTHOR]
        whole = len(block) == _PER_AUTHOR and not any(row.get("subject") for row, _ in block)
        author = _author([f"{row.get('question')}\n{row.get('answer')}" for row, _ in block]) if whole else None
        named += [({**row, "subject": author} if author and author in str(row.get("question")) else row, where)
                  for row, where in block]
    return named


def _asked(row: Mapping[str, Any], question: str, where: str) -> tuple[dict[str, Any], str]:
    """A row whose question is put in other words, which may leave the subject's name out."""
    subject = row.get("subject")
    return {**row, "question": question, "subject": subject if subject and str(subject) in question else None}, where


def _author(texts: Sequence[str]) -> str | None:
    """The longest of the names, two to five capitalised words and what may stand between them (van, de, bin), that are in
    nearly as many of the texts as the most frequent one; nobody where that is in less than three of four."""
    seen: Counter[str] = Counter()
    for text in texts:
        names = set()
        for match in _WORDS.finditer(text):
            words = match[0].split(" ")
            names |= {" ".join(words[i:i + n]) for n in range(2, 6) for i in range(len(words) - n + 1)
                      if words[i][0].isupper() and words[i + n - 1][0].isupper()
                      and all(word[0].isupper() or len(word) < 4 for word in words[i:i + n])}
        seen.update(names)
    often = {name: count for name, count in seen.items() if count >= 0.75 * len(texts)}
    known = [name for name, count in often.items() if count >= 0.9 * max(often.values())]
    return max(known, key=lambda name: (len(name.split()), often[name], name), default=None)


def _muse(part: str, data: str | Path | None, seed: int) -> Benchmark:
    part = part or "news"
    if part not in ("news", "books"):
        raise RecordError(f"muse:{part}: the parts of MUSE are news and books")
    tables = _Tables(f"muse-{part}", data, f"muse-bench/MUSE-{part.capitalize()}")
    # The published data splits what may stay in two and trains on the first, as open-unlearning does.
    shown = {"forget": tables.optional("raw", "forget"),
             "retain": tables.optional("raw", "retain1") or tables.optional("raw", "retain")}
    holdout = tables.optional("privleak", "holdout")
    return Benchmark(
        "", forget=_set("forget", tables.rows("knowmem", "forget_qa")),
        forget_extra={"verbatim": _set("verbatim", tables.rows("verbmem", "forget"), prompt="prompt", answer="gt")},
        retain={"retain": _set("retain", tables.rows("knowmem", "retain_qa"))},
        members=_set("members", tables.rows("privleak", "forget")) if holdout else None,
        holdout=_set("holdout", holdout) if holdout else None,
        shown={name: _set(name, rows) for name, rows in shown.items()} if all(shown.values()) else {})


def _wmdp(part: str, data: str | Path | None, seed: int) -> Benchmark:
    part = part or "bio"
    if part not in ("bio", "cyber", "chem"):
        raise RecordError(f"wmdp:{part}: the parts of WMDP are bio, cyber and chem")
    tables = _Tables("wmdp", data, "cais/wmdp")
    general = data is None or (Path(data) / "mmlu").is_dir()
    return Benchmark("", forget=_choices("forget", tables.rows(f"wmdp-{part}", "test")),
                     skills=_mmlu("", data, seed).skills if general else {})


def _mmlu(part: str, data: str | Path | None, seed: int) -> Benchmark:
    tables = _Tables("mmlu", data, "cais/mmlu")
    subjects = listed(part)
    skills: dict[str, RecordSet] = {}
    if tables.folder is None:
        for subject in subjects or ["all"]:
            skills[f"mmlu_{subject}"] = _choices(f"mmlu_{subject}", tables.rows(subject, "test"))
        return Benchmark("", skills=skills)
    subjects = subjects or sorted({f.stem.removesuffix("_test") for f in tables.folder.glob("test/*.csv")}
                                  or {f.parent.name for f in tables.folder.glob("*/test*")})
    if not subjects:
        raise RecordError(f"{tables.folder}: holds no subject of MMLU: expected test/SUBJECT_test.csv or"
                          " SUBJECT/test-00000-of-00001.parquet")
    for subject in subjects:
        files = tables.files(subject, "test")
        rows = _mmlu_csv(files[0]) if files and files[0].suffix == ".csv" else tables.rows(subject, "test")
        skills[f"mmlu_{subject}"] = _choices(f"mmlu_{subject}", rows)
    return Benchmark("", skills=skills)


def _mmlu_csv(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """MMLU as first published, without a header: question, four options, the answer's letter; a header is skipped."""
    for row, where in csv_rows(path):
        if len(row) != 6:
            raise RecordError(f"{where}: expected question, four options and the answer, got {len(row)} fields; quote fields"
                              " that hold commas")
        if row[0] != "question":
            yield {"question": row[0], "choices": row[1:5], "answer": row[5]}, where


def _bbh(part: str, data: str | Path | None, seed: int) -> Benchmark:
    tables = _Tables("bbh", data, "lukaemon/bbh")
    tasks = listed(part)
    if not tasks and tables.folder is not None:
        tasks = sorted({f.stem for f in tables.folder.glob("*.json")} or {f.parent.name for f in tables.folder.glob("*/test*")})
    if not tasks:
        raise RecordError("bbh: name the tasks, as bbh:navigate,web_of_lies, or give the folder that holds them")
    return Benchmark("", skills={f"bbh_{task}": _set(f"bbh_{task}", tables.rows(task, "test"), question="input",
                                                     answer="target") for task in tasks})


def _rwku(part: str, data: str | Path | None, seed: int) -> Benchmark:
    tables = _Tables("rwku", data, "jinzhuoran/RWKU")

    def about(config: str, **fields: str) -> RecordSet | None:
        rows = [(row, where) for row, where in tables.optional(config, "test")
                if not part or str(row.get("subject", part)).casefold() == part.casefold()]
        return _set(config, rows, **fields) if rows else None

    forget = about("forget_level2", question="query", answer="answer")
    if forget is None:
        raise RecordError(f"rwku{':' + part if part else ''}: there are no questions in forget_level2; check the subject's"
                          " name and where the data is")
    asked = {name: about(name, question="query", answer="answer") for name in (
        "forget_level1", "forget_level3", "neighbor_level2", "neighbor_level1")}
    members, holdout = (about(name, text="text") for name in ("mia_forget", "mia_retain"))
    general = tables.optional("utility_general", "test")
    return Benchmark(
        "", forget=replace(forget, name="forget"),
        forget_extra={name: s for name in ("forget_level1", "forget_level3") if (s := asked[name]) is not None},
        retain={name: s for name in ("neighbor_level2", "neighbor_level1") if (s := asked[name]) is not None},
        skills={"utility_general": _choices("utility_general", general)} if general else {},
        members=members if holdout is not None else None, holdout=holdout if members is not None else None)


def _world(part: str, data: str | Path | None, seed: int) -> Benchmark:
    from .world import build_world, with_wrong_answers

    world = build_world(part or "easy", seed)
    return Benchmark(
        "", forget=world.forget, forget_paraphrase=world.forget_paraphrase,
        retain={s.name: with_wrong_answers(s, seed) for s in (world.retain_unseen, world.retain_paraphrase)},
        skills=world.skills, holdout=world.holdout,
        shown={"forget": world.forget, "retain": world.retain, **world.skills_train})


def _custom(part: str, data: str | Path | None, seed: int) -> Benchmark:
    if data is None or not Path(data).is_dir():
        raise RecordError("custom: give the folder with forget.jsonl, retain.jsonl and the like")
    files: dict[str, Path] = {}
    for file in sorted(Path(data).iterdir()):
        if file.suffix.lower() in SUFFIXES and (file.stem in ("forget", "retain", "members", "holdout")
                                                or file.stem.startswith(("forget_", "retain_", "skill_"))):
            if file.stem in files:
                raise RecordError(f"{file}: {files[file.stem].name} beside it has the same name; keep one of the two")
            files[file.stem] = file
    sets = {name: read(file, name) for name, file in files.items()}
    if not sets:
        raise RecordError(f"{data}: holds no file that is named for its purpose, as forget.jsonl or skill_sums.csv")
    single = {name: sets.pop(name) for name in ("forget", "forget_paraphrase", "members", "holdout") if name in sets}
    return Benchmark("", **single,  # type: ignore[arg-type]
                     forget_extra={n: s for n, s in sets.items() if n.startswith("forget_")},
                     retain={n: s for n, s in sets.items() if n.startswith("retain")},
                     skills={n: s for n, s in sets.items() if n.startswith("skill_")})


_LOADERS: dict[str, Callable[[str, str | Path | None, int], Benchmark]] = {
    "tofu": _tofu, "muse": _muse, "wmdp": _wmdp, "mmlu": _mmlu, "bbh": _bbh, "rwku": _rwku, "world": _world,
    "custom": _custom}
