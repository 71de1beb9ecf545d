"""What trainers learn from: pictures, captions, masks and class pictures, as samples.

    sources, images      which files options name;  pictures with captions and masks
    buckets              every picture whole, in the size nearest to its shape
    captions, augmentation
    concepts, class_images   samples of several concepts;  pictures for regularisation
    samples              the samples of an update, divided over processes

Imports: io, embedded, models, formats, adapters, sampling, evaluation, editing.
"""
