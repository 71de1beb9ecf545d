"""What an adapter gives back of the picture it learned, shown and measured for its card."""

from __future__ import annotations

from dataclasses import replace

from PIL import Image
from torch import Tensor

from personalize.adapter import Adapter
from personalize.editor import Editor, Sampling
from personalize.images import psnr, to_image, to_pixels
from personalize.model import StableDiffusion


def preview(
    model: StableDiffusion, adapter: Adapter, pixels: Tensor, *, steps: int = 30, seed: int = 0
) -> tuple[dict[str, float], dict[str, Image.Image]]:
    """Figures in dB (PSNR against the source `pixels` (1, 3, H, W)) and the pictures "source" and "reconstruction".

    `autoencoder_db` is the ceiling any adapter has on this base, `reconstruction_db` the replayed source, and
    `standalone_gap_db` what is lost where the source embedding cannot be loaded.  `steps` = 0 draws nothing.
    """
    source = pixels.detach().cpu()
    pictures = {"source": to_image(source)}
    if steps < 1:
        return {}, pictures

    def replayed(part: Adapter) -> Image.Image:
        return Editor(model, part).reconstruct(seeds=[seed], sampling=Sampling(steps=steps))[0]

    pictures["reconstruction"] = replayed(adapter)
    figures = {
        "autoencoder_db": psnr(model.decode(model.encode(pixels)).cpu(), source),
        "reconstruction_db": psnr(to_pixels(pictures["reconstruction"]), source),
    }
    if adapter.source is not None:
        bare = to_pixels(replayed(replace(adapter, source=None)))
        figures["standalone_gap_db"] = figures["reconstruction_db"] - psnr(bare, source)
    return {name: round(value, 2) for name, value in figures.items()}, pictures
