"""Measuring edited pictures.

    metrics, scoring    what is measured, and how measures become one score
    networks            CLIP, ViT and LPIPS, loaded by name
    scorers             CLIP, DINO, LPIPS and the embedded model's own
    benchmarks, report  folders of PIE-Bench, TEdBench and DragBench, and the figures of a run
    point_matching      where a dragged point arrived, by the features of a UNet
    scene_scorer        the embedded model's own scorer

Imports: io, embedded, models.
"""
