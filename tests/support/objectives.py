"""A single-image objective on a tiny model."""

from typing import Any

import torch

from personalize.adapters.lora import add_lora, module_names
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training.single_image_objective import SingleImageObjective

CAPTION = "a photo of a cat on the beach"


def objective(model: StableDiffusion, **settings: Any) -> SingleImageObjective:
    names = [name for name in module_names(model.unet) if ".resnets.1." in name]  # few: quick to add
    add_lora(model.unet, names, 2, 2, seed=0)
    with torch.no_grad():
        return SingleImageObjective(model, model.prompts([CAPTION]), **settings)
