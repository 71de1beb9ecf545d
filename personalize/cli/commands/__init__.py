"""One file per command: what it does with its parsed options.

Imports: io, embedded, models, formats, adapters, sampling, evaluation, editing, training, cli.
"""
