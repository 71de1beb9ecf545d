"""How well an adapter reconstructs the picture it was trained on: pictures and figures for its model card."""

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
    """PSNR figures in dB against the source `pixels` (1, 3, H, W), and the pictures "source" and "reconstruction".

    `autoencoder_db` is what the base's autoencoder reaches, and so the most that any adapter can; `reconstruction_db`
    is the source drawn by the adapter; `standalone_gap_db` is how much of it is lost in programs that cannot load the
    source embedding.  With `steps` = 0 nothing is drawn, and there are no figures.
    """
    source = pixels.detach().cpu()
    pictures = {"source": to_image(source)}
    if steps < 1:
        return {}, pictures

    def reconstruct(part: Adapter) -> Image.Image:
        return Editor(model, part).reconstruct(seeds=[seed], sampling=Sampling(steps=steps))[0]

    pictures["reconstruction"] = reconstruct(adapter)
    figures = {
        "autoencoder_db": psnr(model.decode(model.encode(pixels)).cpu(), source),
        "reconstruction_db": psnr(to_pixels(pictures["reconstruction"]), source),
    }
    if adapter.source is not None:
        standalone = to_pixels(reconstruct(replace(adapter, source=None)))
        figures["standalone_gap_db"] = figures["reconstruction_db"] - psnr(standalone, source)
    return {name: round(value, 2) for name, value in figures.items()}, pictures
