"""Retain records held back from a training, so that settings can be chosen by what it does to records it never saw."""

from __future__ import annotations

import random
from collections.abc import Mapping

from ..errors import ClueError
from .records import RecordSet

#: Share of every retain set that is held back.
VALIDATION_SHARE = 0.2


def hold_back(retain: Mapping[str, RecordSet], seed: int) -> tuple[dict[str, RecordSet], dict[str, RecordSet]]:
    """Split every retain set into what may be seen and validation records, both by the set's name.

    Records of one subject stay together where all records of a set name theirs. At least one record, or subject, goes to
    either side; a set of fewer than two is not split, and has no validation records.

    Raises:
        ClueError: no set could be split.
    """
    seen, held = {}, {}
    for name, records in retain.items():
        subjects = [record.subject for record in records]
        keys = subjects if all(subjects) and len(set(subjects)) > 1 else list(range(len(records)))
        units = list(dict.fromkeys(keys))
        if len(units) < 2:
            seen[name] = records
            continue
        random.Random(f"validation/{name}/{seed}").shuffle(units)
        chosen = set(units[:max(1, round(VALIDATION_SHARE * len(units)))])
        parts = [tuple(r for r, key in zip(records, keys, strict=True) if (key in chosen) == inside)
                 for inside in (False, True)]
        seen[name], held[name] = RecordSet(name, parts[0]), RecordSet(f"{name} (validation)", parts[1])
    if not held:
        raise ClueError("no retain set has two records or more, so none can be held back to tune on: give more records")
    return seen, held
