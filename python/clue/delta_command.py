"""``clue delta``: unlearning as a patch file: made from two models, applied, reverted and looked at.

Heavy imports happen inside the commands.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Add the command to the parser's commands."""
    delta = commands.add_parser("delta", help="what unlearning changed, as a patch file: make, apply, revert, adapter, show")
    deltas = delta.add_subparsers(required=True, metavar="COMMAND")

    make = deltas.add_parser("make", help="write the planned slices of two models as a patch file")
    make.set_defaults(command=_make)
    make.add_argument("before", metavar="BEFORE", help="folder of the model as it was")
    make.add_argument("after", metavar="AFTER", help="folder of the model as it is now")
    make.add_argument("run", metavar="RUN", help="run directory, or the folder of a plan")
    make.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write (.safetensors)")

    for name, summary in (("apply", "write the changed model"), ("revert", "write the model as it was")):
        patch = deltas.add_parser(name, help=f"{summary}, bit for bit, into a new folder")
        patch.set_defaults(command=_patch, patch=name)
        patch.add_argument("model", metavar="MODEL", help="folder of the model as it "
                           + ("was" if name == "apply" else "is now"))
        patch.add_argument("file", metavar="FILE", help="file of `clue delta make`")
        patch.add_argument("-o", "--output", required=True, metavar="OUT", help="new folder")

    adapter = deltas.add_parser("adapter", help="write a patch file as a low-rank adapter that PEFT loads")
    adapter.set_defaults(command=_adapter)
    adapter.add_argument("file", metavar="FILE", help="file of `clue delta make`")
    adapter.add_argument("model", metavar="MODEL", help="folder of the model as it was")
    adapter.add_argument("-o", "--output", required=True, metavar="FOLDER", help="new folder")

    show = deltas.add_parser("show", help="what a patch file changes, and how large it is")
    show.set_defaults(command=_show)
    show.add_argument("file", metavar="FILE", help="file of `clue delta make`")
    show.add_argument("--json", action="store_true", help="as JSON")


def _make(arguments: argparse.Namespace) -> int:
    from .delta import Delta
    from .plan import Plan

    delta = Delta.between(arguments.before, arguments.after, Plan.load(arguments.run))
    delta.save(arguments.output)
    print(f"{arguments.output}: {delta.changed} of {delta.planned} planned weights changed,"
          f" {Path(arguments.output).stat().st_size} bytes")
    return 0


def _patch(arguments: argparse.Namespace) -> int:
    from .delta import Delta

    delta = Delta.load(arguments.file)
    if arguments.patch == "apply":
        delta.apply_folder(arguments.model, arguments.output)
        print(f"{arguments.output}: the model after, {delta.changed} weights put in place")
    else:
        delta.revert_folder(arguments.model, arguments.output)
        print(f"{arguments.output}: the model before, {delta.changed} weights put back")
    return 0


def _adapter(arguments: argparse.Namespace) -> int:
    from .adapter import export
    from .delta import Delta

    found = export(Delta.load(arguments.file), arguments.model, arguments.output)
    whole = f", {len(found.whole)} stored whole" if found.whole else ""
    print(f"{arguments.output}: {len(found.ranks)} modules of rank at most {max(found.ranks.values(), default=0)}{whole};"
          f" merged, no weight is more than {found.largest_difference:.1e} off")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from .delta import Delta
    from .weights import unit_of

    delta = Delta.load(arguments.file)
    facts = {"before": delta.before, "after": delta.after, "planned": delta.planned, "changed": delta.changed,
             "bytes": Path(arguments.file).stat().st_size, "slice_bytes": sum(c.xor.nbytes for c in delta.changes),
             "changes": [{"parameter": c.parameter, "axis": unit_of(c.parameter, c.axis), "count": len(c.index),
                          "of": c.shape[c.axis], "dtype": c.dtype, "planned": c.xor.size, "changed": c.changed}
                         for c in delta.changes]}
    if arguments.json:
        print(json.dumps(facts, indent=1))
        return 0
    width = max((len(c.parameter) for c in delta.changes), default=0)
    for c in delta.changes:
        print(f"  {c.parameter.ljust(width)}  {c.dtype}  {len(c.index)} of {c.shape[c.axis]} {unit_of(c.parameter, c.axis)},"
              f" {c.changed} of {c.xor.size} weights changed")
    print(f"before  {delta.before or 'not recorded'}\nafter   {delta.after or 'not recorded'}")
    print(f"{delta.changed} of {delta.planned} planned weights changed; {facts['bytes']} bytes for {facts['slice_bytes']}"
          " bytes of weights")
    return 0
