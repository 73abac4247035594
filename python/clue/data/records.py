"""Records: reading question-answer and plain-text data from files, the hub or Python lists, and comparing sets.

A record set is what the user calls a forget set or a retain set. Everything malformed is refused here, with the file
and the line, so that no later stage has to wonder what it was given.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import OverlapError, RecordError

PROMPT_FIELDS = ("question", "prompt", "input", "instruction")
ANSWER_FIELDS = ("answer", "completion", "output", "response", "target")
CORRUPTED_FIELDS = ("corrupted", "corrupted_question")
PARAPHRASED_FIELDS = ("paraphrased_answer",)
WRONG_FIELDS = ("perturbed_answer", "wrong_answers")
OPTIONAL_FIELDS = (*CORRUPTED_FIELDS, "subject", "group", *PARAPHRASED_FIELDS, *WRONG_FIELDS)
CHAT_FIELDS = ("messages", "conversations", "conversation")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

CHAT = "chat messages are not read: give the user's turn as question and the assistant's as answer"

_HUB_ID = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%+-]+))?")


@dataclass(frozen=True)
class Record:
    """One question with its answer, or one plain text (``prompt`` empty, the text in ``answer``).

    ``corrupted`` is a given corrupted prompt; ``subject`` the entity the prompt is about, a substring of the prompt
    that counterfactuals replace; ``group`` is shared by records that ask the same thing of different subjects;
    ``source`` says where the record came from and appears in every error about it. ``paraphrased`` is the answer in
    other words and ``wrong`` are wrong answers of the same form, both for evaluation alone: truth ratio, choice.
    """

    prompt: str
    answer: str
    corrupted: str | None = None
    subject: str | None = None
    group: str | None = None
    source: str = ""
    paraphrased: str | None = None
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecordSet:
    """A named, ordered set of records."""

    name: str
    records: tuple[Record, ...]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the contents, not of the file: every field of every record, in order, but for where it came from."""
        rows = [astuple(replace(r, source="")) for r in self.records]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()

    def __repr__(self) -> str:
        said = f"{len(self)} record{'s' * (len(self) != 1)}"
        if subjects := sum(record.subject is not None for record in self.records):
            said += f", {subjects} with a subject"
        origins = {record.source.rpartition(":")[0] for record in self.records}  # empty for items of a list
        if len(origins) == 1 and (origin := origins.pop()):
            said += f", from {Path(origin).name if Path(origin).suffix.lower() in SUFFIXES else origin}"
        return f"<RecordSet {self.name}: {said}>"

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


#: A row of a file, as it stands there, and where that is.
Row = tuple[Any, str]
Source = str | os.PathLike | Sequence[Mapping[str, Any] | Record | tuple[str, str] | str]


def read(source: Source | RecordSet, name: str | None = None, *, limit: int = 0) -> RecordSet:
    """Read records; the first ``limit`` of them when ``limit`` is not 0.

    ``source`` is a .jsonl, .json (an array, one object, or JSON lines), .csv or .parquet file, a hub dataset
    ``owner/name[:config][@split]`` (split ``train`` unless given), or a Python sequence whose items are mappings,
    records, (prompt, answer) pairs, or strings (plain texts).

    A mapping gives its prompt in the first present of ``question``, ``prompt``, ``input``, ``instruction`` (an
    ``instruction`` with a non-empty ``input`` is joined to it by a newline) and its answer in the first present of
    ``answer``, ``completion``, ``output``, ``response``, ``target``; or plain text in ``text``. Optional: ``corrupted``
    or ``corrupted_question``, ``subject``, ``group``, ``paraphrased_answer``, and ``perturbed_answer`` or
    ``wrong_answers`` (a string or a list of strings), each of which may also be empty. A field that is null is not there, and
    other fields are ignored.

    ``name`` defaults to the file's stem, the dataset's name, or ``records``. Raises :class:`RecordError` naming file
    and line for anything missing, empty, malformed or of the wrong type.
    """
    if limit < 0:
        raise RecordError(f"limit = {limit} must be how many records to read, or 0 for all")
    if isinstance(source, RecordSet):
        records, default = iter(source.records), source.name
    elif isinstance(source, (str, os.PathLike)):
        rows, default = _open(source)
        records = (make_record(value, where) for value, where in rows)
    elif isinstance(source, Sequence):
        records, default = (_item(item, f"records[{i}]") for i, item in enumerate(source)), "records"
    else:
        raise RecordError(f"records must come from a file, a hub dataset or a list, got {type(source).__name__}")
    kept: list[Record] = []
    for record in records:
        kept.append(record)
        if limit and len(kept) == limit:
            break
    if not kept:
        raise RecordError(f"{_described(source)}: holds no records; at least one is needed")
    return RecordSet(name or default, tuple(kept))


def read_rows(source: str | os.PathLike) -> Iterator[tuple[Any, str]]:
    """The rows of a file or hub dataset as they stand there, each with where it was; same sources and errors as
    :func:`read`, which makes records of them."""
    return _open(source)[0]


def csv_rows(path: Path) -> Iterator[tuple[list[str], str]]:
    """The rows of a CSV file, its header's too but not the empty ones, each with the line that it starts on.

    Raises:
        RecordError: the file cannot be read, is not UTF-8 or not CSV.
    """
    text = _text(path)
    # A field may be as long as the file. The limit is the process's, so it is only raised: another reader may rely on it.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                yield row, f"{path}:{line}"
            line = reader.line_num + 1
    except csv.Error as error:
        raise RecordError(f"{path}:{line}: not valid CSV ({error}); repair this row") from None


def make_record(value: object, where: str) -> Record:
    """A record from a mapping with the fields that :func:`read` knows; ``where`` is its source."""
    if not isinstance(value, Mapping):
        raise RecordError(f"{where}: a record must be an object with named fields, got {type(value).__name__};"
                          ' write {"question": ..., "answer": ...}, and an array of them in a .json file')
    value = {name: text for name, text in value.items() if not _left_out(name, text)}
    corrupted, subject, group = (_field(value, names, where) for names in (CORRUPTED_FIELDS, ("subject",), ("group",)))
    prompt_name = next((name for name in PROMPT_FIELDS if name in value), None)
    if prompt_name is None and "text" in value:
        if corrupted is not None:
            raise RecordError(f"{where}: a plain text takes no corrupted prompt, since it is cut where its tokens are half;"
                              " give question, answer and corrupted, or leave it out")
        return Record("", _field(value, ("text",), where) or "", None, None, group, where)
    if prompt_name is None and (chat := next((name for name in CHAT_FIELDS if name in value), None)) is not None:
        raise RecordError(f"{where}: no prompt, only {chat}; {CHAT}")
    if prompt_name is None:
        raise RecordError(f"{where}: no prompt; {_expected(value, PROMPT_FIELDS, ' or text')}")
    if "instruction" in value and prompt_name == "input":
        prompt = _field(value, ("instruction",), where) or ""
        if value["input"] != "":
            prompt += "\n" + (_field(value, ("input",), where) or "")
    else:
        prompt = _field(value, (prompt_name,), where) or ""
    answer = _field(value, ANSWER_FIELDS, where)
    if answer is None:
        raise RecordError(f"{where}: no answer; {_expected(value, ANSWER_FIELDS)}")
    if subject is not None and subject not in prompt:
        raise RecordError(f"{where}: the subject {subject!r} does not occur in the prompt; spell it as in the prompt")
    return Record(prompt, answer, corrupted, subject, group, where, _field(value, PARAPHRASED_FIELDS, where),
                  _wrong(value, where))


def _expected(value: Mapping[str, Any], names: Sequence[str], more: str = "") -> str:
    return (f"expected one of the fields {', '.join(names)}{more}, found {', '.join(map(str, value)) or 'none'}; add it, or"
            " name it exactly so: in small letters, without blanks")


def _left_out(name: object, value: object) -> bool:
    """Whether a field counts as not there: null, or an optional one that is empty, as tables leave it."""
    return value is None or (name in OPTIONAL_FIELDS and isinstance(value, str) and not value.strip())


def subject_pattern(record: Record) -> re.Pattern[str]:
    """Where a record's texts name its subject: not within other words, unless it only stands there, as in languages without
    spaces."""
    inside = re.escape(str(record.subject))
    whole = rf"(?<!\w){inside}(?!\w)"
    return re.compile(whole if re.search(whole, record.prompt) else inside)


def overlap(a: RecordSet, b: RecordSet) -> int:
    """How many records of ``a`` are also in ``b``, comparing prompt and answer whatever their case and whitespace."""
    keys = {_key(record) for record in b}
    return sum(_key(record) in keys for record in a)


def check_disjoint(a: RecordSet, b: RecordSet, what: str) -> None:
    """Raise :class:`OverlapError` naming the first shared record and both its sources if the two sets share any.

    ``what`` names the two sets for the message, as in "the forget set and the retain set".
    """
    theirs: dict[tuple[str, str], Record] = {}
    for record in b:
        theirs.setdefault(_key(record), record)
    shared = [record for record in a if _key(record) in theirs]
    if not shared:
        return
    first, other = shared[0], theirs[_key(shared[0])]
    where = f"{first.source or a.name} and {other.source or b.name}"
    if {_key(record) for record in a} == theirs.keys():
        raise OverlapError(f"{what} are equal: all {len(a)} records, the first at {where}; give two different sets")
    shown = first.prompt or first.answer
    raise OverlapError(f"{what} must not share records, but {len(shared)} of {len(a)} are in both, the first at"
                       f" {where}: {shown[:80]!r}; remove them from one of the two")


def read_sets(forget: Source | RecordSet, retain: Source | RecordSet | Mapping[str, Source | RecordSet], *,
              required: bool = True) -> dict[str, RecordSet]:
    """The forget set first, then the retain sets by name.

    Raises:
        RecordError: a source cannot be read or is empty, or no set is given to retain although one is ``required``.
        OverlapError: a retain set shares records with the forget set.
    """
    named = dict(retain) if isinstance(retain, Mapping) else {"retain": retain}
    if not named and required:
        raise RecordError("retain: give at least one set of records to keep")
    if "forget" in named:
        raise RecordError("retain: a retain set cannot be named forget; give it another name: NAME=FILE on the command line, a"
                          " dict {name: source} in Python")
    sets = {"forget": read(forget, "forget"), **{name: read(source, name) for name, source in named.items()}}
    for name in named:
        check_disjoint(sets["forget"], sets[name], f"the forget set and the retain set {name}")
    return sets


def to_mapping(record: Record) -> dict[str, Any]:
    """The record as :func:`read` takes it back from a JSON lines file (without its source)."""
    values: dict[str, Any] = {"prompt": record.prompt, "answer": record.answer} if record.prompt else {
        "text": record.answer}
    optional = {"corrupted": record.corrupted, "subject": record.subject, "group": record.group,
                "paraphrased_answer": record.paraphrased, "perturbed_answer": list(record.wrong) or None}
    return values | {key: value for key, value in optional.items() if value is not None}


def _key(record: Record) -> tuple[str, str]:
    return " ".join(record.prompt.split()).casefold(), " ".join(record.answer.split()).casefold()


def _described(source: object) -> str:
    if isinstance(source, RecordSet):
        return f"the set {source.name}"
    return str(source) if isinstance(source, (str, os.PathLike)) else "the list of records"


def _open(source: str | os.PathLike) -> tuple[Iterator[Row], str]:
    path = Path(source)
    suffix = path.suffix.lower()
    hub = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
    if hub and suffix not in SUFFIXES and not path.exists():
        return _from_hub(source, hub), hub["path"].split("/")[1]
    if not path.exists():
        raise RecordError(f"{path}: no such file; give a {', '.join(SUFFIXES)} file or a hub dataset owner/name")
    if path.is_dir():
        raise RecordError(f"{path}: is a folder; give one {', '.join(SUFFIXES)} file in it")
    if suffix not in SUFFIXES:
        raise RecordError(f"{path}: unknown kind of file {suffix!r}; known are {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return _from_parquet(path), path.stem
    if suffix == ".csv":
        return _from_csv(path), path.stem
    text = _text(path)
    if not text.strip():
        raise RecordError(f"{path}: the file is empty; at least one record is needed")
    start = text.lstrip()
    if suffix == ".json" and start.startswith("["):
        return _from_array(path, text), path.stem
    if suffix == ".json" and start.startswith("{"):
        line = 1 + text.count("\n", 0, -len(start))
        with suppress(ValueError, RecursionError):  # JSON lines, or malformed: both are read line by line below
            return iter([(json.loads(text), f"{path}:{line}")]), path.stem
    return _from_lines(path, text), path.stem


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecordError(f"{path}:{line}: is not UTF-8; convert the file to UTF-8") from None


def _from_lines(path: Path, text: str) -> Iterator[Row]:
    # Split at "\n" only: str.splitlines would also cut at separators that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:  # a plain ValueError: a number of too many digits
                raise RecordError(f"{where}: not valid JSON ({error}); put one JSON object on each line") from None
            yield value, where


def _from_array(path: Path, text: str) -> Iterator[Row]:
    # Elements are decoded one by one, so that each knows the line it starts on.
    decoder = json.JSONDecoder()
    position, line, first = text.index("[") + 1, 1 + text.count("\n", 0, text.index("[")), True

    def skip(at: int) -> int:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    while True:
        start = skip(position)
        line += text.count("\n", position, start)
        where = f"{path}:{line}"
        if text[start:start + 1] == "]":
            break
        if not first:
            if text[start:start + 1] != ",":
                raise RecordError(f"{where}: not valid JSON (expected ',' or ']' after a record); repair the array")
            position, start = start + 1, skip(start + 1)
            line += text.count("\n", position, start)
            where = f"{path}:{line}"
        try:
            value, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{where}: not valid JSON ({error}); repair this record") from None
        yield value, where
        line, first = line + text.count("\n", start, position), False
    if text[start + 1:].strip():
        raise RecordError(f"{where}: text follows the end of the array; keep one JSON array in the file")


def _from_csv(path: Path) -> Iterator[Row]:
    rows = csv_rows(path)
    header, where = next(rows, ([], ""))
    if not header:
        raise RecordError(f"{path}: the file is empty; at least one record is needed")
    if len(header) == 1 and re.search("[;\t]", header[0]):
        raise RecordError(f"{where}: the header {header[0]!r} is one field; separate fields with commas")
    for row, where in rows:
        if len(row) > len(header):
            raise RecordError(f"{where}: more fields than the header has; quote fields that hold commas")
        yield dict(zip(header, row, strict=False)), where


def _from_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RecordError(f"{path}: reading Parquet needs pyarrow; install clue-unlearn[parquet]") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordError(f"{path}: not a readable Parquet file ({error}); write it again") from None
    return _rows(rows, str(path))


def _from_hub(source: str | os.PathLike, match: re.Match[str]) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise RecordError(f"{source}: no such file, and reading a hub dataset needs datasets; install"
                          " clue-unlearn[datasets] or give a local file") from None
    try:
        rows = datasets.load_dataset(match["path"], match["config"], split=match["split"] or "train")
    except (OSError, ValueError) as error:
        raise RecordError(f"{source}: the dataset cannot be loaded ({error}); check its name, config and"
                          " split") from None
    return _rows(rows, str(source))


def _rows(rows: Iterable[Mapping[str, Any]], where: str) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        yield {key: value for key, value in row.items() if value is not None}, f"{where}:{number}"


def _item(item: object, where: str) -> Record:
    if isinstance(item, Record):
        make_record(to_mapping(item), item.source or where)
        return item if item.source else replace(item, source=where)
    if isinstance(item, str):
        if Path(item).suffix.lower() in SUFFIXES and (len(item.split()) == 1 or os.path.exists(item)):
            raise RecordError(f"{where}: {item!r} is the name of a file, and a list holds records: give the file alone, or"
                              " several sets by name, {name: file}")
        return make_record({"text": item}, where)
    if isinstance(item, RecordSet):
        raise RecordError(f"{where}: is the set {item.name}, and a list holds records: give several sets by name,"
                          " {name: set}")
    if isinstance(item, (tuple, list)):
        if len(item) != 2:
            raise RecordError(f"{where}: a sequence must be (prompt, answer), got {len(item)} items")
        return make_record({"prompt": item[0], "answer": item[1]}, where)
    return make_record(item, where)


def _wrong(value: Mapping[str, Any], where: str) -> tuple[str, ...]:
    name = next((name for name in WRONG_FIELDS if name in value), None)
    if name is None:
        return ()
    answers = [value[name]] if isinstance(value[name], str) else value[name]
    if not isinstance(answers, (list, tuple)) or not all(isinstance(a, str) and a.strip() for a in answers):
        raise RecordError(f"{where}: {name} must be a string or a list of strings, none of them empty")
    for text in answers:
        _check_whole(text, name, where)
    return tuple(answers)


def _field(value: Mapping[str, Any], names: Sequence[str], where: str) -> str | None:
    name = next((name for name in names if name in value), None)
    if name is None:
        return None
    text = value[name]
    if not isinstance(text, str):
        raise RecordError(f"{where}: {name} must be a string, got {type(text).__name__}; {_remedy(text, where)}")
    if not text.strip():
        raise RecordError(f"{where}: {name} is empty; fill it in or remove the record")
    _check_whole(text, name, where)
    return text


def _remedy(value: object, where: str) -> str:
    """How something that is no string becomes one."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(part, Mapping) and not {"role", "from"}.isdisjoint(part) for part in parts):
        return CHAT
    if isinstance(value, (list, tuple)):
        return "give one string; of several answers, one record each"
    if isinstance(value, Mapping):
        return "give one string"
    in_python = where.startswith("records[")
    return "put it in quotes" if in_python or re.search(r"\.jsonl?:\d+$", where, re.I) else "store the column as strings"


def _check_whole(text: str, name: str, where: str) -> None:
    """Tokenizers take no half characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError(f"{where}: {name} holds half of a surrogate pair ({text[error.start]!r}), which is no character;"
                          " write the text again as UTF-8") from None
