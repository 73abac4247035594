"""Graph: the nodes of a transformer, with integer ids in topological order; and Circuit: a gated part of its edges.

Writers add to the residual stream (``embed``, head outputs, MLP outputs), readers take from it (q, k, v of each head or
key/value group, MLPs, ``logits``). Every edge runs from a lower id to a higher one. Names are those of EAP-IG
(``a5.h3``, ``m7``, ``a5.h3<q>``); a key/value group is ``a5.g1<k>`` and a hidden neuron ``m7.n42``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.atomic import write_arrays
from ..errors import CircuitError
from ..types import Gate, NodeKind, Provenance
from ..values import ByValue

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: By kind, with a node's layer and its number there to be put in.
_NAMES: Mapping[int, str] = {
    NodeKind.EMBED: "embed", NodeKind.LOGITS: "logits", NodeKind.Q: "a{0}.h{1}<q>", NodeKind.K: "a{0}.g{1}<k>",
    NodeKind.V: "a{0}.g{1}<v>", NodeKind.HEAD: "a{0}.h{1}", NodeKind.MLP_IN: "m{0}.in", NodeKind.NEURON: "m{0}.n{1}",
    NodeKind.MLP: "m{0}"}
#: Of a graph: ten times those of the largest mixtures of experts. Files that ask for more would take all memory.
MOST_NODES = 2**28


@dataclass(frozen=True, eq=False)
class Graph(ByValue):
    """All nodes of a model; defined by its dimensions alone.

    With ``neurons``, an MLP is three kinds of node: its reader ``m3.in``, its hidden units ``m3.n0`` ... and its writer
    ``m3``; otherwise it is the single node ``m3``. With ``parallel``, attention and MLP of a layer read the same residual
    stream, so no edge runs from a layer's heads to its own MLP.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int
    neurons: bool
    parallel: bool = False

    def __post_init__(self) -> None:
        for name, least in (("n_layers", 1), ("n_heads", 1), ("n_kv_heads", 1), ("d_mlp", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise CircuitError(f"a graph's {name} must be a whole number, at least {least}, got {value!r}")
        if self.n_heads % self.n_kv_heads:
            raise CircuitError(f"a graph's {self.n_heads} query heads cannot share {self.n_kv_heads} key/value groups evenly")
        if self.n_nodes > MOST_NODES:
            raise CircuitError(f"a graph of {self.n_nodes} nodes is larger than any model's: more than {MOST_NODES}")

    @cached_property
    def layer_size(self) -> int:
        """Number of nodes in a layer."""
        return 2 * self.n_heads + 2 * self.n_kv_heads + (2 + self.d_mlp if self.neurons else 1)

    @cached_property
    def n_nodes(self) -> int:
        """Number of nodes, ``embed`` and ``logits`` included."""
        return 2 + self.n_layers * self.layer_size

    @property
    def embed(self) -> int:
        """Id of the embedding."""
        return 0

    @property
    def logits(self) -> int:
        """Id of the output."""
        return self.n_nodes - 1

    def node(self, kind: NodeKind, layer: int = 0, index: int = 0) -> int:
        """Id of a node (its layer and its number within the layer)."""
        if kind is NodeKind.EMBED:
            return self.embed
        if kind is NodeKind.LOGITS:
            return self.logits
        h, g = self.n_heads, self.n_kv_heads
        start = {NodeKind.Q: 0, NodeKind.K: h, NodeKind.V: h + g, NodeKind.HEAD: h + 2 * g,
                 NodeKind.MLP_IN: 2 * (h + g), NodeKind.NEURON: 2 * (h + g) + 1,
                 NodeKind.MLP: self.layer_size - 1}[kind]
        return 1 + layer * self.layer_size + start + index

    def mlp_reader(self, layer: int) -> int:
        """Id of the node that reads the residual stream for an MLP."""
        return self.node(NodeKind.MLP_IN if self.neurons else NodeKind.MLP, layer)

    @cached_property
    def kind(self) -> npt.NDArray[np.uint8]:
        """uint8 [nodes], values of :class:`NodeKind`."""
        h, g = self.n_heads, self.n_kv_heads
        mlp = [NodeKind.MLP_IN] + [NodeKind.NEURON] * self.d_mlp + [NodeKind.MLP] if self.neurons else [NodeKind.MLP]
        layer = [NodeKind.Q] * h + [NodeKind.K] * g + [NodeKind.V] * g + [NodeKind.HEAD] * h + mlp
        return np.array([NodeKind.EMBED, *layer * self.n_layers, NodeKind.LOGITS], dtype=np.uint8)

    @cached_property
    def layer(self) -> Ints:
        """int32 [nodes]; -1 for ``embed``, ``n_layers`` for ``logits``."""
        inner = np.repeat(np.arange(self.n_layers, dtype=np.int32), self.layer_size)
        return np.concatenate([[-1], inner, [self.n_layers]]).astype(np.int32)

    @cached_property
    def index(self) -> Ints:
        """int32 [nodes]: number of the head, group or neuron within its layer."""
        h, g = self.n_heads, self.n_kv_heads
        mlp = [0, *range(self.d_mlp), 0] if self.neurons else [0]
        layer = [*range(h), *range(g), *range(g), *range(h), *mlp]
        return np.array([0, *layer * self.n_layers, 0], dtype=np.int32)

    @cached_property
    def editable(self) -> Bools:
        """bool [nodes]: the node owns weights that a plan may name."""
        without = [NodeKind.EMBED, NodeKind.LOGITS, NodeKind.MLP_IN]
        if self.neurons:
            without.append(NodeKind.MLP)  # its weights belong to its neurons
        editable: Bools = ~np.isin(self.kind, without)
        return editable

    def name(self, node: int) -> str:
        """Name of a node, as people and files see it."""
        return _NAMES[int(self.kind[node])].format(int(self.layer[node]), int(self.index[node]))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all nodes, in id order."""
        columns = (array.tolist() for array in (self.kind, self.layer, self.index))  # one by one takes ten times as long
        return tuple(_NAMES[kind].format(layer, index) for kind, layer, index in zip(*columns, strict=True))

    @cached_property
    def writers(self) -> Ints:
        """Ids of the nodes that write to the residual stream, in order: embed, then each layer's heads and MLP."""
        ids = [self.embed]
        for layer in range(self.n_layers):
            ids += [self.node(NodeKind.HEAD, layer, h) for h in range(self.n_heads)]
            ids.append(self.node(NodeKind.MLP, layer))
        return np.array(ids, dtype=np.int32)

    @cached_property
    def readers(self) -> Ints:
        """Ids of the nodes that read the residual stream, in order: each layer's q, k, v and MLP, then logits."""
        ids: list[int] = []
        for layer in range(self.n_layers):
            ids += [self.node(NodeKind.Q, layer, h) for h in range(self.n_heads)]
            ids += [self.node(NodeKind.K, layer, g) for g in range(self.n_kv_heads)]
            ids += [self.node(NodeKind.V, layer, g) for g in range(self.n_kv_heads)]
            ids.append(self.mlp_reader(layer))
        return np.array([*ids, self.logits], dtype=np.int32)

    @cached_property
    def residual_edges(self) -> Bools:
        """bool [writers, readers]: true where an edge exists, that is where the writer comes before the reader."""
        edges: Bools = self.writers[:, None] < self.readers[None, :]
        if self.parallel:
            edges &= self.layer[self.writers][:, None] < self.layer[self.readers][None, :]
        return edges

    @cached_property
    def inside_heads(self) -> tuple[Ints, Ints]:
        """Sources and targets of the edges inside heads: each head's q, then its group's k, then its v, all into o."""
        heads = np.flatnonzero(self.kind == NodeKind.HEAD)
        first, head = 1 + self.layer[heads] * self.layer_size, self.index[heads]
        k = first + self.n_heads + head // (self.n_heads // self.n_kv_heads)
        sources = np.concatenate([first + head, k, k + self.n_kv_heads])
        return sources.astype(np.int32), np.tile(heads, 3).astype(np.int32)

    def to_json(self) -> dict[str, Any]:
        """The dimensions, from which everything else follows."""
        return {"n_layers": self.n_layers, "n_heads": self.n_heads, "n_kv_heads": self.n_kv_heads,
                "d_mlp": self.d_mlp, "neurons": self.neurons, "parallel": self.parallel}


@dataclass(frozen=True, eq=False)
class Circuit(ByValue):
    """Edges that matter for one set, each with its gate, its scores and the reason it is there.

    Attributes:
        name: name of the record set.
        graph: the nodes.
        src, dst: int32 [edges], sorted by (dst, src).
        gate: uint8 [edges], values of :class:`Gate`: how the edge enters its receiver.
        provenance: uint8 [edges], bits of :class:`Provenance`; added to, never taken away.
        ns, dn: float64 [edges]; NaN where there is no score: on structural edges, and in the direction another tool
            did not measure (the one score of an edge of ``UNKNOWN`` provenance stands in ``ns``).
        faithfulness: what selection by a faithfulness target measured; ``None`` if nobody did.
    """

    name: str
    graph: Graph
    src: Ints
    dst: Ints
    gate: npt.NDArray[np.uint8]
    provenance: npt.NDArray[np.uint8]
    ns: Floats
    dn: Floats
    faithfulness: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        n = self.graph.n_nodes
        for part in ("dst", "gate", "provenance", "ns", "dn"):
            if getattr(self, part).shape != self.src.shape:
                raise CircuitError(f"circuit {self.name}: {part} has the shape {getattr(self, part).shape}, and src"
                                   f" {self.src.shape}: each edge has one of either")
        if len(self.gate) and self.gate.max() > max(Gate):
            raise CircuitError(f"circuit {self.name}: there is no gate {self.gate.max()}")
        for array in (self.src, self.dst):
            if len(array) and (array.min() < 0 or array.max() >= n):
                raise CircuitError(f"circuit {self.name}: an edge names a node outside 0..{n - 1}")
        if np.any(self.src >= self.dst):
            edge = int(np.flatnonzero(self.src >= self.dst)[0])
            raise CircuitError(f"circuit {self.name}: edge {self.graph.name(self.src[edge])} ->"
                               f" {self.graph.name(self.dst[edge])} runs backwards, which would close a cycle")
        beside = (self.graph.kind[self.src] == NodeKind.HEAD) & (self.graph.layer[self.src] == self.graph.layer[self.dst])
        if self.graph.parallel and np.any(beside):
            edge = int(np.argmax(beside))
            raise CircuitError(f"circuit {self.name}: edge {self.graph.name(self.src[edge])} ->"
                               f" {self.graph.name(self.dst[edge])} does not exist in a model whose attention and MLP"
                               " read the same stream")

    def __len__(self) -> int:
        return len(self.src)

    @cached_property
    def nodes(self) -> Bools:
        """bool [nodes]: the nodes some edge touches."""
        found = np.zeros(self.graph.n_nodes, dtype=bool)
        found[self.src] = True
        found[self.dst] = True
        return found

    def counts(self) -> dict[str, int]:
        """Edges per gate, structural ones apart, and nodes."""
        scored = self.provenance != Provenance.STRUCTURAL
        found = {g.name.lower(): int(np.count_nonzero(scored & (self.gate == g))) for g in Gate}
        return {**found, "structural": int(np.count_nonzero(~scored)), "nodes": int(self.nodes.sum())}

    def summary(self) -> str:
        """Its size and, as far as somebody looked, its faithfulness and what exact patching says of its gates."""
        said = [] if self.faithfulness is None else [f"faithfulness {self.faithfulness:.2f}"]
        seen = {p.name: np.count_nonzero(self.provenance & p) for p in (Provenance.CONFIRMED, Provenance.CONTRADICTED)}
        if any(seen.values()):
            said.append("inputs of gates: " + ", ".join(f"{count} {str(name).lower()}" for name, count in seen.items()))
        return f"{len(self)} edges" + (f" ({'; '.join(said)})" if said else "")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the circuit as one safetensors file."""
        arrays: dict[str, npt.NDArray[Any]] = {"src": self.src, "dst": self.dst, "gate": self.gate,
                                               "provenance": self.provenance, "ns": self.ns, "dn": self.dn}
        metadata = {"name": self.name, "graph": json.dumps(self.graph.to_json(), sort_keys=True)}
        if self.faithfulness is not None:
            metadata["faithfulness"] = repr(self.faithfulness)
        write_arrays(path, arrays, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """Read a circuit that :meth:`save` wrote."""
        from safetensors import safe_open

        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata()
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
            measured = metadata.get("faithfulness")
            return cls(metadata["name"], Graph(**json.loads(metadata["graph"])), **arrays,
                       faithfulness=None if measured is None else float(measured))
        except FileNotFoundError:
            raise CircuitError(f"{path} does not exist: make it with `clue localize`") from None
        except CircuitError:
            raise
        except Exception as error:
            raise CircuitError(f"{path} is not a circuit file ({error})") from None


def on_path(n_nodes: int, src: Ints, dst: Ints, source: int, sink: int) -> Bools:
    """bool [edges]: the edge lies on a path from ``source`` to ``sink``. Ids must be topological (src < dst)."""
    return reached(n_nodes, src, dst, source)[src] & reached(n_nodes, dst, src, sink)[dst]


def reached(n_nodes: int, src: Ints, dst: Ints, start: int) -> Bools:
    """bool [nodes]: the nodes that edges lead to from ``start``, which is one of them."""
    found = np.zeros(n_nodes, dtype=bool)
    found[start] = True
    while True:  # one sweep per hop; a transformer has few hops per layer
        new = np.zeros(n_nodes, dtype=bool)
        new[dst[found[src]]] = True
        if not np.any(new & ~found):
            return found
        found |= new


def sort_edges(src: Ints, dst: Ints, *columns: npt.NDArray[Any]) -> Sequence[npt.NDArray[Any]]:
    """All arrays in (dst, src) order, so that equal circuits are equal arrays."""
    order = np.lexsort((src, dst))
    return [array[order] for array in (src, dst, *columns)]
