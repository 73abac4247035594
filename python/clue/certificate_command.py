"""``clue certificate check``: a proof of the optimum is looked at again, without the solver.

Exit status 0: the certificate proves that its cost is the least. 1: it does not. 2: it is no certificate, or one of
another question, or the question cannot be read.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from . import solve
from .errors import ClueError, RefutedError


def add_to(commands: Any) -> None:
    """Add the command to the parser's commands."""
    certificate = commands.add_parser("certificate", help="check that an optimum is proven, without the solver")
    certificates = certificate.add_subparsers(required=True, metavar="COMMAND")
    check = certificates.add_parser("check", help="check a certificate that `clue solve --certify` wrote",
                                    description="Exit status 0: the cost is proven to be the least. 1: it is not, and"
                                    " why. 2: the certificate is none, or of another question.")
    check.set_defaults(command=_check)
    check.add_argument("file", metavar="QUESTION", help="what was solved: formula.wcnf, question.json or a circuit")
    check.add_argument("certificate", metavar="CERTIFICATE", help="the file written by --certify")
    check.add_argument("--json", action="store_true", help="as JSON")
    solve.add_question(check.add_argument_group("circuits, as they were solved"))


def _check(arguments: argparse.Namespace) -> int:
    kind = solve.kind_of(arguments.file)
    try:
        if kind == ".wcnf":
            from . import sat

            if arguments.retain:
                raise ClueError("--retain goes with .json or .safetensors files only")
            found = sat.check_certificate(sat.read_wcnf(arguments.file), arguments.certificate)
        elif kind in (".json", ".safetensors"):
            from . import logic

            forget, retain, weights = solve.read_circuits(arguments.file, arguments.retain)
            found = logic.check_certificate(forget, retain, arguments.certificate, semantics=arguments.semantics,
                                            weights=weights)
        else:
            raise ClueError(f"{arguments.file}: expected a name that ends in .wcnf, .json or .safetensors")
    except RefutedError as error:
        print(json.dumps({"verified": False, "reason": str(error)}) if arguments.json else f"refuted: {error}")
        return 1
    if arguments.json:
        print(json.dumps({"verified": True, **asdict(found)}))
        return 0
    claim = f"no model costs less than {found.cost}, and one costs that" if found.satisfiable else "there is no model"
    print(f"verified: {claim}\n{found.root} are paid by propagation alone; {found.cores} cores pay the rest, checked by"
          f" {found.clauses} derived clauses from {found.axioms} of the question's, in {found.sections} parts"
          f" ({found.size} bytes)")
    return 0
