"""Dynamic prompt learning: noun embeddings, fitted so that each noun attends to its own object.

References: Wang et al., arXiv 2309.15664.

Imports: io, models, adapters, sampling.
"""
