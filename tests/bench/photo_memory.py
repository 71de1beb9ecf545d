"""Memory that reading and fitting a photo's attention takes on SDXL at 1024 px, counted without computing anything.

    python -m tests.bench.photo_memory     # about four minutes; gibibytes

The UNet is SDXL's, in fp16, on fake tensors: shapes without values. After every operation the bytes of all live
storages are summed, each once; the largest sum is the peak. `weights` are the UNet's alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from personalize.editing.dynamic_prompt_learning.stage_maps import stage_attention
from personalize.models.attention import hooked
from personalize.models.attention_maps import InversionMaps
from personalize.models.empty import CONFIGS
from personalize.models.gradient_checkpointing import gradient_checkpointing
from personalize.models.stable_diffusion import Conditioning
from personalize.sampling.schedule import Step

GIB = 2**30


class PeakBytes(TorchDispatchMode):
    """Counts the largest number of bytes that tensors made inside the context hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for key, (reference, size) in list(self.live.items()):
            if reference.expired():
                self.now -= size
                del self.live[key]
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result


class FakeModel:
    """The part of `StableDiffusion` that attention is read from: SDXL's UNet without values."""

    def __init__(self) -> None:
        torch.set_default_dtype(torch.float16)
        try:
            config = UNet2DConditionModel.load_config(CONFIGS / "sdxl" / "unet")
            self.unet: Any = UNet2DConditionModel.from_config(config).requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(torch.float32)

    def predict(self, latents: torch.Tensor, timestep: Any, conditioning: Conditioning) -> torch.Tensor:
        extra = {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
        return self.unet(latents, timestep, conditioning.embeds, added_cond_kwargs=extra, return_dict=False)[0]


def report_pass(model: Any, latents: torch.Tensor, step: Step, conditioning: Conditioning) -> None:
    """Two predictions of `--report`: the maps of every step are summed on the device."""
    maps = InversionMaps(model, (latents.shape[-2], latents.shape[-1]))
    for _ in range(2):
        with torch.no_grad(), hooked(model.unet, [maps], step=step):
            model.predict(latents, step.timestep, conditioning)


def dynamic_pass(model: Any, latents: torch.Tensor, step: Step, conditioning: Conditioning) -> None:
    """One update of `--dpl`: the stage's maps with their graph, and its backward pass to the embeddings."""
    conditioning.embeds.requires_grad_(True)
    with torch.enable_grad():
        stage_attention(model, latents, step, conditioning).sum().backward()


def checkpointed_pass(model: Any, latents: torch.Tensor, step: Step, conditioning: Conditioning) -> None:
    """`dynamic_pass` with `--gradient_checkpointing`."""
    with gradient_checkpointing(model.unet):
        dynamic_pass(model, latents, step, conditioning)


PASSES: dict[str, Callable[..., None]] = {
    "report": report_pass, "dpl": dynamic_pass, "dpl_checkpointing": checkpointed_pass,
}  # fmt: skip


def peak(name: str, side: int = 128) -> dict[str, float]:
    """GiB of the UNet's weights, and of all else at the peak of the pass `name`, for latents of side² cells."""
    half = {"dtype": torch.float16}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = FakeModel()
        weights = sum(parameter.nbytes for parameter in model.unet.parameters())
        latents, step = torch.zeros(1, 4, side, side, **half), Step(500, 480, 500, 0.5, 0.6)
        conditioning = Conditioning(
            torch.zeros(1, 77, 2048, **half), torch.zeros(1, 1280, **half), torch.zeros(1, 6, **half)
        )
        with PeakBytes() as counted:
            PASSES[name](model, latents, step, conditioning)
    return {"weights": round(weights / GIB, 2), "activations": round(counted.peak / GIB, 2)}


if __name__ == "__main__":
    for name in PASSES:
        print(name, json.dumps(peak(name)), flush=True)
