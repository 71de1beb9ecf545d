"""How the embedded model and its scorer are trained; nothing outside this folder and `train/` imports it.

Imports: io, embedded, models, evaluation, training.
"""
