"""Editing without inversion (InfEdit): source and target are sampled from the same noise, and the source is known.

Virtual inversion: at every level the source row is the encoded photo z_0 with fresh noise,

    z_src = √ᾱ z_0 + √(1−ᾱ) n

so that the noise ε_cons = (z_src − √ᾱ z_0) / √(1−ᾱ) leads from it to z_0 exactly: the photo need not be inverted. With
σ² = 1 − ᾱ′ a DDIM transition becomes a step of multi-step consistency sampling, z′ = √ᾱ′ x̂0 + √(1−ᾱ′) n′ (the paper's
"denoising diffusion consistent model"). The target is corrected by the error that the source's prediction makes:

    x̂0_tgt = f(z_tgt, ε_tgt − ε_src + ε_cons) = z_0 + f(z_tgt, ε_tgt) − f(z_src, ε_src)
    z′_tgt = √ᾱ′ x̂0_tgt + √(1−ᾱ′) n′ = z′_src + √ᾱ′ (x̂0_tgt − z_0),          f(z, ε) = (z − √(1−ᾱ) ε) / √ᾱ

The right-hand forms are what is computed: they hold for ε and v prediction alike, and need no stored noise. Attention
control works on the two rows as after inversion. With n steps an edit costs n predictions of both rows.

Checks: a target that says what the source says gives the photo's latents; the source row is the photo at every level;
the correction equals the left-hand form; estimates that differ by a constant change the photo by that constant; an edit
asks for no prediction before it samples.

Few-step bases (LCM, Turbo) need a schedule that begins at pure noise: timesteps are spaced from the noisy end.

References: Xu et al., "Inversion-Free Image Editing with Natural Language", arXiv 2312.04965, §3, algorithm 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from personalize.models.parameterization import noised
from personalize.models.transfer import sent
from personalize.randomness import generator
from personalize.sampling.denoise import LatentEdit
from personalize.sampling.schedule import Schedule, Step


def noisy_versions(clean: Tensor, down: Schedule, seed: int, method: str = "none") -> Tensor:
    """`clean` (1, c, h, w) with independent noise at every level of schedule `down`: (t+1, 1, c, h, w), clean first.

    The noise of equal `seed` and inversion `method` is equal.
    """
    noisy = [clean]
    for number, transition in enumerate(reversed(down.steps)):
        noise = torch.randn(clean.shape, generator=generator(seed, f"inversion/{method}", number))
        noisy.append(noised(clean, sent(noise, clean.device).to(clean), transition.alpha))
    return torch.stack(noisy)


class ConsistentRows(LatentEdit):
    """Keeps row 0 at the photo's noisy versions, and corrects rows 1 … (the targets) by the error of row 0.

    It must come before other latent edits: what they change in the estimates is not carried to the next level.

    Args:
        versions: as `noisy_versions` returns them.
    """

    def __init__(self, versions: Tensor) -> None:
        self.versions = versions
        self.change: Tensor | None = None  # x̂0_tgt − z_0 of the current step, (b − 1, c, h, w)

    def clean(self, x0: Tensor, step: Step) -> Tensor:
        photo = sent(self.versions[0], x0.device).to(x0)
        self.change = x0[1:] - x0[:1]
        return torch.cat([photo, photo + self.change])

    def latents(self, z: Tensor, step: Step) -> Tensor:
        assert self.change is not None
        source = sent(self.versions[step.count - 1 - step.index], z.device).to(z)
        last = step.index == step.count - 1
        signal = 1.0 if last else step.alpha_next**0.5  # the last level is the photo itself
        return torch.cat([source, source + signal * self.change])
