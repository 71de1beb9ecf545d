"""Mutual self-attention: the target asks its own questions of the source's picture.

    A_tgt = softmax(Q_tgt K_srcᵀ / √d) V_src        in the decoder's finer stages, from step 4 on

References: Cao et al., "MasaCtrl: Tuning-Free Mutual Self-Attention Control", arXiv 2304.08465, eq. 4; layers 10 to 15
of SD 1.x's sixteen, and the last six of SDXL's, are the decoder's stages but the coarsest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from personalize.attention import AttentionHook, AttentionSite, attention_sites
from personalize.model import StableDiffusion


class MutualAttention(AttentionHook):
    """Rows 1 … of the null and of the conditional pass see keys and values of row 0 of the same pass.

    Args:
        start: number of the first step that does so; before it the layout of the target is made.
        sites: names; by default self-attention of the decoder without its coarsest stage.
    """

    def __init__(self, model: StableDiffusion, start: int = 4, sites: frozenset[str] | None = None) -> None:
        self.start, self.sites = start, sites if sites is not None else finer_decoder(model)

    def wants(self, site: AttentionSite) -> bool:
        return site.name in self.sites

    def active(self, site: AttentionSite) -> bool:
        return site.step is not None and site.step.index >= self.start

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        return q, torch.cat([k[:1]] * len(k)), torch.cat([v[:1]] * len(v))


def finer_decoder(model: StableDiffusion) -> frozenset[str]:
    """Self-attention of the decoder except at its coarsest stage (of one stage alone, that one)."""
    ours = {name: site for name, site in attention_sites(model.unet).items() if site.place == "up" and not site.cross}
    coarsest = max(site.level for site in ours.values())
    return frozenset(n for n, site in ours.items() if site.level < coarsest) or frozenset(ours)
