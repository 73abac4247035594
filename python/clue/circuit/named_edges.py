"""Edges by name in JSON files, to arrays of ids: every record that is malformed is refused by its place in the file."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CircuitError
from ..types import NodeKind
from .graph import Bools, Floats, Graph, Ints

PathLike = str | os.PathLike[str]
#: Says where in a file a record is, by its number from 0.
Where = Callable[[int], str]

MADE_FOR = "read it into the graph of the model it was made for"
AGAIN = "write the file again, or remove the key 'clue' to read the flags alone"


def load(path: PathLike) -> Any:
    """The file's JSON document; a key that an object has twice is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            again = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CircuitError(f"{path}: {shortened(again)} is there twice: keep one of them")
        return found

    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise CircuitError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise CircuitError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except (ValueError, RecursionError) as error:
        raise CircuitError(f"{path} is not JSON, or is cut short ({error}): write it again") from None


def json_object(path: PathLike, value: Any, key: str, needed: Iterable[str] = ()) -> dict[str, Any]:
    """The value at a key (the empty one is the document), an object that has the keys needed."""
    what = f"{path}: {key}" if key else f"{path}"
    remedy = AGAIN if key.startswith("clue") else "take a file that Graph.to_json wrote"
    if not isinstance(value, dict):
        raise CircuitError(f"{what} must be a JSON object, not {shortened(value)}: {remedy}")
    for name in needed:
        if name not in value:
            raise CircuitError(f"{what} has no {name!r}: {remedy}")
    return value


def record_list(path: PathLike, graph: Graph, width: int) -> list[list[Any]]:
    """The records of a list file, each a list of ``width``; at least one."""
    check_block_level(path, graph)
    rows = load(path)
    form = "[source, target]" if width == 2 else "[source, target, gate]"
    if not isinstance(rows, list):
        raise CircuitError(f"{path} must be a JSON list of {form}, not {shortened(rows)}: check that it is the right file")
    if not rows:
        raise CircuitError(f"{path} has no edges: raise the share of edges that is kept, and write it again")
    odd = next((i for i, row in enumerate(rows) if not isinstance(row, list) or len(row) != width), None)
    if odd is not None:
        raise CircuitError(f"{path}: record {odd + 1} is {shortened(rows[odd])}, not {form}: check that it is the"
                           " right file")
    return rows


def record_at(path: PathLike) -> Where:
    """Places in a list file."""
    return lambda row: f"{path}: record {row + 1}"


def node_ids(values: Sequence[object], known: Mapping[str, int], others: Mapping[str, int], graph: Graph, where: Where,
             role: str) -> Ints:
    """Ids of nodes by name; ``others`` are the names at the other end of an edge, and ``role`` is start or end."""
    found = np.array([known.get(value, -1) if isinstance(value, str) else -1 for value in values], dtype=np.int32)
    if len(found) == 0 or found.min() >= 0:
        return found
    row = int(np.argmax(found < 0))
    value = values[row]
    what = f"{where(row)}: {shortened(value)}"
    if not isinstance(value, str):
        raise CircuitError(f"{what} is not the name of a node, which is a string: correct or remove it")
    forms = {_form(name): name for name in reversed(list(known))}  # one example of each
    if _form(value) in forms:
        raise CircuitError(f"{what} is not in a model of {graph.n_layers} layers, {graph.n_heads} heads and"
                           f" {graph.n_kv_heads} key/value groups: {MADE_FOR}")
    why = f"cannot {role} an edge" if _form(value) in map(_form, others) else "is not the name of a node"
    raise CircuitError(f"{what} {why}: name one like {', '.join(sorted(forms.values()))}, or remove the edge")


def _form(name: str) -> str:
    return re.sub("[0-9]+", "0", name)


def labels(values: Sequence[object], known: Mapping[str, int], where: Where, what: str) -> npt.NDArray[np.uint8]:
    """Numbers of labels, such as gates, by name."""
    found = np.array([known.get(value, -1) if isinstance(value, str) else -1 for value in values], dtype=np.int16)
    if len(found) and found.min() < 0:
        row = int(np.argmax(found < 0))
        raise CircuitError(f"{where(row)}: {what} {shortened(values[row])} is none of {', '.join(known)}: correct it")
    return found.astype(np.uint8)


def number(value: object) -> float | None:
    """A JSON number, NaN for null; None for anything else."""
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return None


def flags_and_scores(path: PathLike, edges: Mapping[str, Any]) -> tuple[Bools, Floats]:
    """What EAP-IG says of every edge: ``in_graph`` and ``score``."""
    flags, scores = np.zeros(len(edges), dtype=bool), np.zeros(len(edges))
    for i, (name, info) in enumerate(edges.items()):
        flag = info.get("in_graph") if isinstance(info, dict) else None
        score = number(info.get("score", "missing")) if isinstance(info, dict) else None
        if type(flag) is not bool or score is None:
            raise CircuitError(f"{path}: edge {name!r} must have a number 'score' and a true or false 'in_graph', not"
                               f" {shortened(info)}: take a file that Graph.to_json wrote")
        flags[i], scores[i] = flag, score
    return flags, scores


def check_block_level(path: PathLike, graph: Graph) -> None:
    """Refuse a graph with hidden neurons as nodes."""
    if graph.neurons:
        raise CircuitError(f"{path} has no hidden neurons as nodes: read it into a graph with neurons=False")


def check_once(rows: Sequence[list[Any]], where: Where) -> None:
    """Refuse an edge that is there twice."""
    records = [tuple(row) for row in rows]  # names and gates, by now known to be strings
    if len(set(records)) == len(records):
        return
    first: dict[tuple[str, ...], int] = {}
    for i, record in enumerate(records):
        if record in first:
            raise CircuitError(f"{where(i)}: {record[0]} -> {record[1]} repeats number {first[record] + 1}: remove one")
        first[record] = i


def check_forward(graph: Graph, src: Ints, dst: Ints, where: Where) -> None:
    """Refuse an edge that the model cannot have."""
    backwards = src >= dst
    if backwards.any():
        row = int(np.argmax(backwards))
        raise CircuitError(f"{where(row)}: {graph.name(src[row])} -> {graph.name(dst[row])} runs backwards: an edge"
                           " goes from a writer to a later reader, so swap the two or remove it")
    beside = graph.parallel & (graph.kind[src] == NodeKind.HEAD) & (graph.layer[src] == graph.layer[dst])
    if beside.any():
        row = int(np.argmax(beside))
        raise CircuitError(f"{where(row)}: {graph.name(src[row])} -> {graph.name(dst[row])} does not exist in a model"
                           f" whose attention and MLP read the same stream: {MADE_FOR}")


def shortened(value: object) -> str:
    """A value as it is written, for a message."""
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
