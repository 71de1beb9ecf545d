"""The small Stable Diffusion model that ships with the package, and the world of scenes that it knows.

    model/         its weights, as a stock diffusers folder, and its card
    scenes         captioned scenes of one or two things, rendered with their true masks
    frames         scenes in frames that are not square
    backgrounds    the colours and places behind the things
    variation      changes to a sprite, as if of another style
    samples        the five pictures of `personalize quickstart`, with the true outcome of each edit
    scene_scorer.safetensors   weights of the scorer in `evaluation.scene_scorer`
    sprites/       the art the scenes are made of

Imports: io.
"""
