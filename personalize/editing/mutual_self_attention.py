"""Mutual self-attention (MasaCtrl): the target's queries attend to the keys and values of the source.

    A_tgt = softmax(Q_tgt K_srcᵀ / √d) V_src        in the decoder without its coarsest stage,
                                                from step 4 of 50 on

References: Cao et al., "MasaCtrl: Tuning-Free Mutual Self-Attention Control", arXiv 2304.08465, eq. 4. The published
layers, 10 to 15 of SD 1.x's sixteen and the last six of SDXL's, are the decoder's layers outside its coarsest stage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from personalize.models.attention import AttentionHook, AttentionSite, attention_sites
from personalize.models.stable_diffusion import StableDiffusion

START = 4 / 50


class MutualAttention(AttentionHook):
    """Gives rows 1 … (the targets) the keys and values of row 0 (the source), in the null and the conditional pass.

    Args:
        start: the share of the steps before it begins, which form the target's layout: 4 of 50 as published.
        sites: names of attention layers; by default those of `fine_decoder_sites`.
    """

    def __init__(self, model: StableDiffusion, start: float = START, sites: frozenset[str] | None = None) -> None:
        self.start, self.sites = start, sites if sites is not None else fine_decoder_sites(model)

    def wants(self, site: AttentionSite) -> bool:
        return site.name in self.sites

    def active(self, site: AttentionSite) -> bool:
        return site.step is not None and site.step.index >= round(self.start * site.step.count)

    def qkv(self, q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> tuple[Tensor, Tensor, Tensor]:
        return q, torch.cat([k[:1]] * len(k)), torch.cat([v[:1]] * len(v))


def fine_decoder_sites(model: StableDiffusion) -> frozenset[str]:
    """Names of the decoder's self-attention layers outside its coarsest stage; if it has one stage, of that stage."""
    sites = {name: site for name, site in attention_sites(model.unet).items() if site.place == "up" and not site.cross}
    coarsest = max(site.level for site in sites.values())
    return frozenset(name for name, site in sites.items() if site.level < coarsest) or frozenset(sites)
