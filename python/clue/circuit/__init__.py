"""Circuits: the graph of a model, the scores of its edges and neurons, and the gated sub-graphs cut from them."""
