"""Editing methods, and the two front doors to them.

    editor, attach            with an adapter of ours; inside somebody else's pipeline
    adapter_base              the base of an adapter, and what it predicts
    real_image                photos: inversion, then an edit beside the reconstruction;  prepared_photo, photo_sheets
    word_maps                 where each word of a photo looks
    region                    where a photo may change, and its own pixels everywhere else
    strengths, defaults       the dials of an edit; where a measured default differs
    search                    choose the strengths by drawing and scoring
    vector_projection         edits of text embeddings
    prompt_to_prompt/  dynamic_prompt_learning/  drag/
    uniform_attention, mutual_self_attention
    config, photo_settings    the settings that options fill;  real_image_settings: what an edit of a photo is asked for

Imports: io, embedded, models, formats, adapters, sampling, evaluation.
"""
