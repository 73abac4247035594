"""``clue plan``: a plan in words, why its nodes have their roles, and a model checked against it.

Heavy imports happen inside the commands.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan import Plan

#: How nodes are named, for the help of what prints or takes names.
NAMES = ("Counted from 0, a0.h3 is head 3 of layer 0, a0.h3<q> its queries, a0.g1<k> and a0.g1<v> the keys and values of"
         " group 1 there; m2.n291 is neuron 291 of layer 2's MLP, m2 that MLP as a whole.")


def add_to(commands: Any) -> None:
    """Add the command to the parser's commands."""
    plan = commands.add_parser("plan", help="look at a plan, explain it, or check a model against it")
    plans = plan.add_subparsers(required=True, metavar="COMMAND")
    show = plans.add_parser("show", help="nodes by role and layer, slices and weights")
    show.set_defaults(command=_show)
    show.add_argument("run", metavar="RUN", help="run directory, or the folder of a plan")
    show.add_argument("--nodes", type=_count, default=0, metavar="N",
                      help=f"also list the first N conflict and forget nodes. {NAMES}")
    show.add_argument("--json", action="store_true", help="as JSON")
    explain = plans.add_parser("explain", help="why a node has its role, and what would change if it had another")
    explain.set_defaults(command=_explain)
    explain.add_argument("run", metavar="RUN", help="run directory")
    explain.add_argument("node", metavar="NODE", nargs="+", help="name of a node, as `clue plan show --nodes` lists it."
                         f" {NAMES}")
    verify = plans.add_parser("verify", help="compare two models bit by bit: did only planned weights change?")
    verify.set_defaults(command=_verify)
    verify.add_argument("before", metavar="BEFORE", help="folder of the model as it was")
    verify.add_argument("after", metavar="AFTER", help="folder of the model as it is now")
    verify.add_argument("run", metavar="RUN", help="run directory, or the folder of a plan")
    verify.add_argument("--json", action="store_true", help="as JSON")


def _show(arguments: argparse.Namespace) -> int:
    from .plan import Plan

    plan = Plan.load(arguments.run)
    if arguments.json:
        print(json.dumps(_facts(plan, arguments.nodes), indent=1))
    else:
        print(_text(_facts(plan, arguments.nodes)))
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from . import jobs
    from .run_directory import Run

    print("\n".join(jobs.explain(Run.open(arguments.run), arguments.node)))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from .plan import Plan, verify

    verification = verify(arguments.before, arguments.after, Plan.load(arguments.run))
    if arguments.json:
        print(json.dumps({"ok": verification.ok, "planned": verification.planned, "changed": verification.changed,
                          "outside": dict(verification.outside)}, indent=1))
    else:
        print(verification)
    return 0 if verification.ok else 1


def _facts(plan: Plan, nodes: int) -> dict[str, Any]:
    """Counts, roles by layer, slices by parameter and weights of a plan, and its first ``nodes`` edited nodes."""
    from .types import Role
    from .weights import unit_of

    names = [role.name.lower() for role in Role]
    layers: dict[str, Counter[str]] = {}
    for node, role in zip(plan.nodes, plan.role.tolist(), strict=True):
        layer = re.match(r"[a-z]+(\d+)\b", node)
        layers.setdefault(layer[1] if layer else node, Counter())[names[role]] += 1
    slices: dict[str, dict[str, Any]] = {}
    for s in plan.slices:
        facts = slices.setdefault(s.parameter, {"axis": unit_of(s.parameter, s.axis),
                                                "of": plan.shapes[s.parameter][s.axis], "forget": 0, "conflict": 0})
        facts[s.role.name.lower()] = len(s.index)
    edited = [{"node": node, "role": names[role]} for wanted in (Role.CONFLICT, Role.FORGET)
              for node, role in zip(plan.nodes, plan.role.tolist(), strict=True) if role == wanted]
    return {"counts": plan.counts(), "layers": {k: dict(v) for k, v in layers.items()}, "slices": slices,
            "weights_changed": plan.weights_changed, "nodes": edited[:nodes]}


def summary(plan: Plan) -> str:
    """Nodes by role, and the number of weights."""
    weights = f"{plan.weights_changed} weights may change"
    if not plan.nodes:  # a baseline's, which chose weights
        return f"{weights}, in {len(plan.parameters())} matrices"
    counts = ", ".join(f"{count} {role}" for role, count in plan.counts().items())
    return f"{len(plan.nodes)} nodes: {counts}\n{weights}"


def _text(facts: dict[str, Any]) -> str:
    roles = tuple(facts["counts"])
    table = [["", *roles]]
    table += [[layer, *(str(counts.get(role, 0)) for role in roles)] for layer, counts in facts["layers"].items()]
    table.append(["all", *(str(count) for count in facts["counts"].values())])
    lines = ["Nodes by layer and role", *_aligned(table), "", "Slices of weights that may change"]
    slices = [["", "of", "forget", "conflict"]]
    slices += [[name, f"{s['of']} {s['axis']}", str(s["forget"]), str(s["conflict"])]
               for name, s in facts["slices"].items()]
    lines += [*_aligned(slices), "", f"{facts['weights_changed']} weights may change"]
    if facts["nodes"]:
        lines += ["", "Edited nodes", *(f"  {n['node']}  {n['role']}" for n in facts["nodes"])]
    return "\n".join(lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows]


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError
    return value


_count.__name__ = "count"  # argparse puts it into its message
