"""Editing methods, of a picture drawn from noise and of a photo.

    editor, attach            how they are called: on a base model with an adapter; in a pipeline of diffusers
    adapter_base              the base of an adapter, and what it predicts
    real_image                photos: inversion, then an edit beside the reconstruction;  prepared_photo, photo_sheets
    word_maps                 the cross-attention map of each word of a photo
    region                    where a photo may change, and its own pixels everywhere else
    config, photo_settings    the settings that options fill;  real_image_settings: what an edit of a photo is asked for
    defaults                  the settings that depend on the base model
    search, stored_strengths  choose the strengths by drawing and scoring; the best ones in the adapter's folder
    vector_projection         edits of text embeddings
    prompt_to_prompt/  dynamic_prompt_learning/  drag/
    uniform_attention, mutual_self_attention

Imports: io, embedded, models, formats, adapters, sampling, evaluation.
"""
