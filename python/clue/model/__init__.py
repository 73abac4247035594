"""Models: where a family keeps its heads, projections and norms (anatomy), and what two runs of it carry (capture)."""
