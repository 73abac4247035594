"""Documented enums shared by every stage: directions, gates, roles and node kinds. No logic lives here."""

from __future__ import annotations

from enum import Enum, IntEnum, IntFlag


class Direction(Enum):
    """Which run is patched into which (published libraries disagree, so the name is always explicit).

    ``NOISING`` (Ns) estimates what patching the corrupted activation into the clean run does to the target:
    ``<corrupted - clean, gradient at the clean run>``. ``DENOISING`` (Dn) estimates what patching the clean activation
    into the corrupted run does: ``<clean - corrupted, gradient at the corrupted run>``. An edge that carries the answer
    therefore has Ns < 0 and Dn > 0.
    """

    NOISING = "noising"
    DENOISING = "denoising"


class Gate(IntEnum):
    """How a receiver combines its inputs (arXiv 2505.10039): found by Ns only, by Dn only, or by both."""

    AND = 0
    OR = 1
    ADDER = 2


class Provenance(IntFlag):
    """Why an edge is in a circuit, as bits that are only ever added.

    ``NOISING`` and ``DENOISING`` say which direction found it. ``STRUCTURAL`` is q, k, v -> o inside a head and
    reader -> neuron inside an MLP, which exist because of the architecture and carry no score of their own. ``UNKNOWN``,
    no bit at all, is an edge from another tool's file that does not say which direction found it. ``CONFIRMED``: exact
    patching saw the gate that the directions say; ``CONTRADICTED``: it saw another, which is the edge's gate now.
    """

    UNKNOWN = 0
    NOISING = 1
    DENOISING = 2
    BOTH = 3
    STRUCTURAL = 4
    CONFIRMED = 8
    CONTRADICTED = 16


class Role(IntEnum):
    """What the solved formula says of a node (CLUE, ICLR 2026)."""

    FREE = 0
    RETAIN = 1
    FORGET = 2
    CONFLICT = 3


class NodeKind(IntEnum):
    """What a node of the graph is. ``HEAD`` is a head's output (o); ``MLP_IN`` is an MLP's reader when its neurons are
    nodes of their own, in which case ``MLP`` is only its writer."""

    EMBED = 0
    Q = 1
    K = 2
    V = 3
    HEAD = 4
    MLP_IN = 5
    NEURON = 6
    MLP = 7
    LOGITS = 8
