"""The options of the ``clue`` command: a parser that says what was meant, and those that several commands share.

Every option of a stage is generated from its dataclass in :mod:`clue.config`.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from itertools import takewhile
from typing import Any, NoReturn

from .config import Settings
from .errors import ClueError

_DEFAULTS = Settings()
_GROUPS = {f.name: getattr(_DEFAULTS, f.name) for f in fields(Settings) if is_dataclass(getattr(_DEFAULTS, f.name))}


#: Where the result of `clue evaluate` is, for programs.
RESULT = "For programs, RUN/evaluation/before.json and after.json hold the result: every measure, and what it was per record."


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes end like every other one: as a ClueError, which says what may have been meant."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As ever, but what is left is an error here: a command's own parser knows what may have been meant. Options that there
        are none of come first: what is missing is often what was mistyped."""
        args = sys.argv[1:] if args is None else list(args)
        mine = takewhile(lambda text: text != "--" and (text.startswith("-") or not self._subparsers), args)
        options = [text.partition("=")[0] for text in mine if re.match(r"--[^\W\d]\S*", text)]
        for option in options if "--help" not in options and "-h" not in args else ():
            if option not in self._option_string_actions:
                self.error(self._unrecognized(option))
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(self._unrecognized(next((text for text in left if text.startswith("-")), left[0])))
        return found, left

    def _unrecognized(self, text: str) -> str:
        known = self._option_string_actions
        prefixed = [flag for group in _GROUPS if (flag := f"--{group}{text[1:]}") in known]
        close = difflib.get_close_matches(text, known, 2, 0.8) or difflib.get_close_matches(text, known, 1)
        return f"unrecognized argument {text}" + (
            f": here it is {', '.join(prefixed[:-1])} or {prefixed[-1]}" if len(prefixed) > 1 else
            f"; did you mean {' or '.join(close)}?" if close else "")

    def error(self, message: str) -> NoReturn:
        raise ClueError(f"{message}{' See' if message.endswith('?') else '; see'} `{self.prog} --help`")


def add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads (default: all cores)")


def add_tests(parser: argparse.ArgumentParser, benchmarks: bool = True) -> None:
    tests = parser.add_argument_group("tests", "what to measure on, besides the forget set")
    default = "those of --benchmark, else the first --retain set" if benchmarks else "the first --retain set"
    tests.add_argument("--test", action="append", default=[], metavar="[NAME=]F",
                       help="records to keep that were never used to localize or train, measured in place of the --retain sets;"
                       f" may be repeated, and the first is the headline (default: {default}, which was trained on)")
    tests.add_argument("--skill", action="append", default=[], metavar="[NAME=]F",
                       help="records of a general skill, reported apart; may be repeated")
    tests.add_argument("--paraphrase", metavar="F", help="the facts to forget in other words")
    tests.add_argument("--holdout", metavar="F", help="records like the forgotten ones that the model was never trained"
                       " on: non-members for membership inference")
    tests.add_argument("--gold", metavar="M", help="a model trained without the forget set, to compare with, or the .json file"
                       " of its evaluation")
    tests.add_argument("--reference", metavar="M", help="a model that knows neither forget set nor holdout, for the reference"
                       " attack")
    if not benchmarks:
        return
    tests.add_argument("--benchmark", metavar="NAME[:PART]", help="the sets of a public benchmark: tofu, muse, wmdp, mmlu, bbh,"
                       " rwku, world, or custom (files named for their purpose)")
    tests.add_argument("--data", metavar="FOLDER", help="where the benchmark's files are (default: the hub)")


def add_settings(parser: argparse.ArgumentParser, own: str, without: Sequence[str] = (), settled: Sequence[str] = ()) -> None:
    """One option per field of every settings group, but for the fields ``without`` (``group.field``). Those of the groups
    ``settled`` can only be given as they are, so the help does not name them.

    A name that several groups have is prefixed by its group (``--unlearn-batch-size``); the command ``own`` stands for
    also takes its own one without prefix.
    """
    general = parser.add_argument_group("general")
    general.add_argument("--config", metavar="TOML", help="settings file with the tables [data], [localize], [unlearn],"
                         " [evaluate], [robustness]; the command line wins")
    for f in fields(Settings):
        if f.name not in _GROUPS and f".{f.name}" not in without:
            _add_option(general, [_flag(f.name)], f".{f.name}", f, getattr(_DEFAULTS, f.name), f.name in settled)
    add_threads(parser)
    shared = Counter(f.name for group in _GROUPS.values() for f in fields(group))
    for name, group in _GROUPS.items():
        section = parser.add_argument_group(name)
        for f in fields(group):
            if f"{name}.{f.name}" in without:
                continue
            flags = [_flag(f.name)] if shared[f.name] == 1 else [_flag(f"{name}_{f.name}")]
            if shared[f.name] > 1 and name == own:
                flags.append(_flag(f.name))
            _add_option(section, flags, f"{name}.{f.name}", f, getattr(group, f.name), name in settled)


def _add_option(group: Any, flags: list[str], destination: str, field: Any, default: Any, hidden: bool) -> None:
    text = f"{field.metadata['help']} (default: {default})".replace("%", "%%")
    keywords: dict[str, Any] = {"dest": destination, "default": argparse.SUPPRESS, "help": text}
    if isinstance(default, bool):
        keywords["action"] = argparse.BooleanOptionalAction
        keywords["help"] = text.replace("default: True", "default: on").replace("default: False", "default: off")
    elif choices := field.metadata.get("choices"):
        keywords["choices"] = choices
    else:
        keywords |= {"type": type(default), "metavar": {int: "N", float: "X"}.get(type(default), "TEXT")}
    group.add_argument(*flags, **keywords | ({"help": argparse.SUPPRESS} if hidden else {}))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
