"""Cross-attention maps of one resolution stage at one step, computed with gradients and no further than needed."""

from __future__ import annotations

from torch import Tensor

from personalize.models.attention import AttentionSite, attention_sites, hooked
from personalize.models.attention_maps import MapStore, StopForward, stage_level
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.sampling.schedule import Step


class StageMaps(MapStore):
    """Stores the cross-attention maps of one stage with their graph; raises `StopForward` after the last of them.

    A block that gradient checkpointing recomputes afterwards stores and stops nothing.
    """

    def __init__(self, model: StableDiffusion, size: tuple[int, int]) -> None:
        level = stage_level(model)
        sites = {n: s for n, s in attention_sites(model.unet, size).items() if s.cross and s.level == level}
        super().__init__(True, keep_graph=True)
        self.names = frozenset(sites)
        self.complete = False

    def wants(self, site: AttentionSite) -> bool:
        return site.name in self.names

    def probs(self, p: Tensor, site: AttentionSite) -> Tensor:
        if self.complete:
            return p
        super().probs(p, site)
        self.complete = len(self.maps) == len(self.names)
        if self.complete:
            raise StopForward
        return p


def stage_attention(model: StableDiffusion, latents: Tensor, step: Step, conditioning: Conditioning) -> Tensor:
    """The cross-attention map (h, w, l) of row 0 at one step, averaged over heads and layers; with gradients.

    The UNet runs only as far as the stage's last layer.
    """
    store = StageMaps(model, (int(latents.shape[-2]), int(latents.shape[-1])))
    try:
        with hooked(model.unet, [store], step=step):
            model.predict(latents[:1], step.timestep, conditioning)
    except StopForward:
        return store.mean()[0]
    raise AssertionError("the UNet's forward pass ended without calling all layers of the stage")
