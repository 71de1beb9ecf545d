"""The one denoising loop, run in either direction.

    schedule     transitions between noise levels
    denoise      the loop: sampling, inversion and replay
    graphed_steps   its steps as replays of one CUDA graph
    trajectory   the latents and noise that were stored on the way
    inversion    real photos to latents that replay to them
    virtual_inversion   editing without inversion: the source row is the photo with fresh noise
    null_text    the empty prompt's embedding, fitted at each step
    config       settings of inversion and null-text that options fill

Imports: io, models, adapters.
"""
