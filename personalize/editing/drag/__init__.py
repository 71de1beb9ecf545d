"""Point drags by attention at one noise level, without training.

    image, preview     pictures of any size: the whole drag, or what it will move, without sampling
    config, points     its options;  points, boxes and polygons
    reading, segment   the picture's attention, read once;  the object under a handle
    selection, compose the masks of what moves;  what moves and where, in pixels
    pixels, detail     warps of pixels;  the fine detail of a large photo in what has moved
    background, inpaint   what first stands in the void;  the void sampled anew
    drag, attention, warp, mask, fill   the method on latents (`--method latents`)
    overlay            the picture that shows a drag

Imports: io, models, adapters, sampling.
"""
