"""Point drags by attention at one noise level, without training.

Imports: io, models, adapters, sampling.
"""
