"""Random LoRAs and adapters for tests, and what a model predicts with them."""

import re

import torch
from torch import nn

from personalize.randomness import generator


def paths(module, want=lambda path: True):
    """The weight shapes of the wanted linear layers and convolutions of `module`, by path."""
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    return {path: layer.weight.shape for path, layer in layers.items() if want(path)}


def random_lora(shapes, component="unet", rank=4, seed=0, spread=0.1):
    """A LoRA in PEFT's names whose B is not zero, on modules of the given weight shapes."""
    state = {}
    for path, shape in shapes.items():
        draw = generator(seed, f"test/{component}.{path}")
        nested = "" if component == "unet" or path.startswith("text_model.") else "text_model."
        stem = f"{component}.{nested}{path}"
        ones = (1,) * (len(shape) - 2)
        state[f"{stem}.lora_A.weight"] = torch.randn(rank, *shape[1:], generator=draw) * spread
        state[f"{stem}.lora_B.weight"] = torch.randn(shape[0], rank, *ones, generator=draw) * spread
    return state


def text_lora(model, **options):
    """A random LoRA on every attention and MLP layer of every text encoder."""
    state = {}
    for component, encoder in zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False):
        state |= random_lora(paths(encoder, lambda path: ".layers." in path), component, **options)
    return state


def predict(model, seed=0):
    """The UNet's prediction (1, 4, h, w) for fixed latents, timestep and prompt."""
    side = model.unet.config.sample_size
    latents = torch.randn(1, 4, side, side, generator=generator(seed, "test/latents"))
    with torch.no_grad():
        return model.predict(latents, 500, model.prompts(["a photo of a cat"]))


def predict_with_delta(model, adapter):
    """`predict` after adding the adapter's ΔW to the weights of `model`, which stay changed.

    This is what every way of loading the adapter must give.
    """
    parts = {"unet": model.unet, **dict(zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False))}
    stems = {key.removesuffix(".lora_A.weight") for key in adapter.lora if key.endswith(".lora_A.weight")}
    for part, module in parts.items():
        for path, layer in module.named_modules():
            nested = "" if part == "unet" or path.startswith("text_model.") else "text_model."
            if (stem := f"{part}.{nested}{path}") in stems:
                a, b = (adapter.lora[f"{stem}.lora_{side}.weight"].flatten(1) for side in "AB")
                with torch.no_grad():
                    layer.weight += (adapter.alpha / adapter.rank * (b @ a)).reshape(layer.weight.shape)
                stems.remove(stem)
    assert not stems, f"not in the model: {stems}"
    return predict(model)


def ATTENTION(path):
    return path.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))


def TRANSFORMER(path):
    return ATTENTION(path) or path.endswith((".proj_in", ".proj_out", ".net.0.proj", ".net.2"))


def EVERYTHING(path):
    return True


def SHALLOW(path):
    """All modules but those of second and further transformer blocks: every kind of name, a third of SDXL's modules."""
    return not re.search(r"transformer_blocks\.[1-9]", path)


def FEW(path):
    """Some modules of every block and of every kind that forgetting rules distinguish; fast to add to a UNet."""
    return path.endswith((".to_k", ".conv1"))


def random_adapter(model, rank=4, seed=0, want=FEW):
    """A random adapter with a source embedding on the wanted single-image modules of `model`; its effect is visible."""
    from personalize.adapters.adapter import Adapter
    from personalize.adapters.lora import module_names

    wanted = set(filter(want, module_names(model.unet, model.family)))
    lora = random_lora(paths(model.unet, wanted.__contains__), rank=rank, seed=seed)
    with torch.no_grad():
        conditioning = model.prompts(["a cat on the beach"])
    source = {"embeds": conditioning.embeds.clone()}
    if conditioning.pooled is not None:
        source["pooled"] = conditioning.pooled.clone()
    size = [model.resolution, model.resolution]
    info = {
        "base": {**model.identity, "prediction_type": model.prediction_type},
        "caption": "a cat on the beach",
        "size": size,
    }
    return Adapter(lora, rank, float(rank), source, info)
