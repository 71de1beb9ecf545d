"""Dynamic prompt learning: noun embeddings, fitted so that each noun attends to its own object.

References: Wang et al., arXiv 2309.15664.

    fit, stored_fit    noun embeddings fitted at each step;  kept for the next edit
    leakage            report where nouns attend
    stage_maps         the maps that are fitted, with gradients
    nouns, noun_groups nouns of a caption;  tokens by the object that they name
    background         the background, estimated from attention

Imports: io, models, adapters, sampling.
"""
