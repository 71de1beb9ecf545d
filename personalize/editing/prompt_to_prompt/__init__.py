"""Prompt-to-Prompt: an edit drawn with the attention maps of the source prompt (Hertz et al., arXiv 2208.01626).

    control      attention of the source for the target
    alignment    which tokens of two prompts correspond
    local_blend  an edit only where given words attend

Imports: io, models, adapters, sampling.
"""
