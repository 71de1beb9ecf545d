"""What trainers learn from: pictures, captions, masks and class pictures, as samples.

Imports: io, embedded, models, formats, adapters, sampling, evaluation, editing.
"""
