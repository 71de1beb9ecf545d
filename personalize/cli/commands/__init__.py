"""One file per command: what it does with its parsed options.

    edit, edit_image, edit_table   with an adapter; a photo; the photos of a table
    marks                          what the pictures of commands say of themselves
    evaluate_run                   the results that `evaluate --run` makes first
    drag, quickstart, inspect, convert, verify, evaluate, doctor   as the commands are called
    convert_transformer            `convert` for files of diffusion transformers

Imports: io, embedded, models, formats, adapters, sampling, evaluation, editing, training, cli.
"""
