"""Training adapters: the two trainers, and what they share.

    config, run_options           the options, which are also the YAML keys
    run                           what every run has: updates, checkpoints, the adapter so far
    single_image, multi_concept   the two kinds of run;  single_image_objective, multi_concept_objective: their losses
    averaging, best_weights       the moving average of what is trained; its best by the scores of pictures
    losses, loop                  loss terms; the loop of updates
    cuda_graph, batched_adapters  one graph per update; several adapters in one batch
    checkpoints, optimizer_state  updates to go on from
    memory_estimate, memory_advice, validation, trainer, distributed
    catalogue, catalogue_table, catalogue_rows, catalogue_results   one adapter for each row of a table
    data/                         pictures, captions and masks as samples
    pretraining/                  how the embedded model was made; no product code imports it
    saving, stopping              what is trained is saved, also elsewhere; signals to stop
    finite                        updates that are not finite;  own_accelerator: of one run alone
    checks                        wrong options, found before torch is imported
    concept_maps                  where each concept's words attend

Imports: io, embedded, models, formats, adapters, sampling, evaluation, editing.
"""
