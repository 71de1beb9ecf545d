"""Predictions of a model with a LoRA applied by other means than ours, and how far two of them differ."""

import torch

from personalize.formats.lora_files import (
    factor_pairs,
)
from tests.support.lora_states import (
    predict,
)

# Merged weights and a LoRA branch add the same products in another order: fp32 rounding, 1e-7 per addition, grows to a
# few 1e-6 of the output's scale through the twenty-odd layers of the tiny UNets.
CLOSE = 1e-5


def with_merged(model, state, strength):
    """The prediction of `model` with ΔW = strength · B A added to the weights: what every loader must give."""
    parts = {"unet": model.unet, **dict(zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False))}
    modules = {
        (component, path.removeprefix("text_model.")): layer
        for component, part in parts.items()
        for path, layer in part.named_modules()
    }
    with torch.no_grad():
        for module, (a, b) in factor_pairs(state).items():
            component, path = module.split(".", 1)
            weight = modules[component, path.removeprefix("text_model.")].weight
            weight += strength * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    return predict(model)


def through_loader(model, path):
    pipe = model.pipeline()
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    try:
        return predict(model)
    finally:
        pipe.unload_lora_weights()


def difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())
