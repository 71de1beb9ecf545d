"""How the embedded model and its scorer are trained; nothing outside this folder and `train/` imports it.

    networks, objectives, dataset, stages   the embedded model
    scorer                                  its scorer

Imports: io, embedded, models, evaluation, training.
"""
