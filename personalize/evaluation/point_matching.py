"""Mean distance of a drag: how far from its target each dragged point is found, by the features of a diffusion UNet.

    d = ‖target − argmax_p cos(F(source)[handle], F(dragged)[p])‖,  in pixels of the source picture

F are the features that the second block of the UNet's decoder gives for the picture with noise of timestep 261, the
mean over 8 draws of the noise, resized bilinearly to the picture (DIFT). DragBench's published figures use Stable
Diffusion 2.1 with pictures of 512 px.

References: Tang et al., "Emergent Correspondence from Image Diffusion", arXiv 2306.03881; Shi et al., "DragDiffusion",
arXiv 2306.14435, section 5.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from personalize.evaluation.benchmarks import Point
from personalize.models.parameterization import noised
from personalize.models.stable_diffusion import StableDiffusion
from personalize.randomness import generator

TIMESTEP, BLOCK, DRAWS = 261, 1, 8


class PointMatching:
    """Finds the points of one picture in another.

    Args:
        model: the base model whose features are compared.
        draws: how many draws of the noise the features are a mean of.
    """

    def __init__(self, model: StableDiffusion, draws: int = DRAWS) -> None:
        self.model, self.draws = model, draws

    @torch.no_grad()
    def features(self, picture: Tensor, prompt: str = "") -> Tensor:
        """F (1, f, H, W) of a picture (1, 3, H, W) in [0, 1]; sides are cut to multiples of the latents' cells."""
        model, (height, width) = self.model, picture.shape[-2:]
        step = 8 * model.factor  # the latents are halved three times
        sides = (max(step, height // step * step), max(step, width // step * step))
        latents = model.encode(2 * interpolate(picture, sides, mode="bilinear", antialias=True) - 1)
        conditioning, alpha = model.prompts([prompt], sides), model.alphas_cumprod[TIMESTEP]
        outputs: list[Tensor] = []
        handle = model.unet.up_blocks[BLOCK].register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            for draw in range(self.draws):
                noise = torch.randn(latents.shape, generator=generator(0, "point-matching", draw)).to(latents)
                model.predict(noised(latents, noise, alpha), TIMESTEP, conditioning)
        finally:
            handle.remove()
        return interpolate(torch.stack(outputs).float().mean(0), (height, width), mode="bilinear")

    def distances(
        self, source: Tensor, dragged: Tensor, points: Sequence[tuple[Point, Point]], prompt: str = ""
    ) -> list[float]:
        """For each (handle, target) of `points`, d in pixels; both pictures are (1, 3, H, W) in [0, 1]."""
        before, after = (self.features(picture, prompt) for picture in (source, dragged))
        found = []
        for (x, y), target in points:
            row, column = min(round(y), before.shape[-2] - 1), min(round(x), before.shape[-1] - 1)
            similarity = cosine_similarity(before[:, :, row, column, None, None], after, dim=1)[0]
            place = divmod(int(similarity.argmax()), similarity.shape[-1])
            found.append(((place[1] - target[0]) ** 2 + (place[0] - target[1]) ** 2) ** 0.5)
        return found
