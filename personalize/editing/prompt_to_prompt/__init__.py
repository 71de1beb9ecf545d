"""Prompt-to-Prompt: an edit that looks where the source's words looked (Hertz et al., arXiv 2208.01626).

Imports: io, models, adapters, sampling.
"""
