"""Records held back: whole subjects, from every set that can spare some, the same for the same seed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clue.data.held_back import hold_back
from clue.data.records import Record, RecordSet
from clue.errors import ClueError


def records(name: str, subjects: list[str | None]) -> RecordSet:
    return RecordSet(name, tuple(Record(f"q{i}", "a", subject=subject) for i, subject in enumerate(subjects)))


@given(st.lists(st.sampled_from(["ada", "bob", "cat", None]), min_size=1, max_size=30), st.integers(0, 9))
def test_held_back_records_are_whole_subjects_and_never_seen(subjects: list[str | None], seed: int) -> None:
    given = {"people": records("people", subjects), "skill": records("skill", [None] * 10)}
    seen, held = hold_back(given, seed)
    again, _ = hold_back(given, seed)
    assert [s.sha256 for s in seen.values()] == [s.sha256 for s in again.values()]
    assert len(held["skill"]) == 2
    for name, whole in given.items():
        kept, back = list(seen[name]), list(held.get(name, ()))
        assert kept and sorted(r.prompt for r in kept + back) == sorted(r.prompt for r in whole)
        if all(r.subject for r in whole) and len({r.subject for r in whole}) > 1:
            assert not {r.subject for r in kept} & {r.subject for r in back}
        assert bool(back) == (len(whole) > 1)


def test_the_seed_and_the_name_decide_what_is_held_back() -> None:
    held = {(name, seed): tuple(r.prompt for r in hold_back({name: records(name, [None] * 40)}, seed)[1][name])
            for name in ("people", "skill") for seed in range(3)}
    assert len(set(held.values())) == len(held)


def test_nothing_to_hold_back_is_an_error() -> None:
    with pytest.raises(ClueError, match="give more records"):
        hold_back({"retain": records("retain", [None])}, 0)
