"""The text encoders' part of a LoRA: training it as layers, and adding it to the weights while prompts are encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from personalize.adapters.lora import add_lora, lora_state, require_no_lora
from personalize.errors import UserError
from personalize.formats.changed_layers import changed
from personalize.formats.lora_files import factor_pairs
from personalize.formats.lora_keys import with_text_model
from personalize.models.config import TEXT_ENCODERS
from personalize.models.empty import parts_of
from personalize.models.stable_diffusion import StableDiffusion

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_TRAINED = {"attention": _ATTENTION, "full": (*_ATTENTION, "fc1", "fc2")}  # as `lora.module_names` calls its sets


def has_text(lora: Mapping[str, Tensor]) -> bool:
    """Whether the LoRA (tensors named as in our adapter files) changes a text encoder."""
    return any(key.startswith("text_encoder") for key in lora)


def add_text_lora(
    model: StableDiffusion, rank: int, alpha: float, seed: int, targets: str = "full", *, orthogonal: bool = False
) -> None:
    """Add a new trainable LoRA to the text encoders' layers, in all blocks that the conditioning depends on.

    SDXL takes the hidden states before the last block of its first encoder, so that block would get no gradient and is
    left out.

    Args:
        targets: "attention" for the attention projections alone, "full" for the MLPs' layers too.
        orthogonal: see `add_lora`.

    Raises:
        UserError: a text encoder already carries an adapter.
    """
    for component, encoder in zip(TEXT_ENCODERS, model.text_encoders, strict=False):
        unused = None
        if model.family == "sdxl" and component == TEXT_ENCODERS[0]:
            unused = f".layers.{encoder.config.num_hidden_layers - 1}."
        names = [
            path
            for path, layer in encoder.named_modules()
            if isinstance(layer, nn.Linear) and path.endswith(_TRAINED[targets]) and not (unused and unused in path)
        ]
        add_lora(encoder, names, rank, alpha, seed, f"{component}.", orthogonal=orthogonal)


def text_lora_state(model: StableDiffusion) -> dict[str, Tensor]:
    """Copies of the text encoders' LoRA tensors, named "text_encoder.text_model.<path>.lora_A.weight", …"""
    state = {}
    for component, encoder in zip(TEXT_ENCODERS, model.text_encoders, strict=False):
        for key, tensor in lora_state(encoder, "").items():
            state[f"{component}.text_model.{key.removeprefix('text_model.')}"] = tensor
    return state


@contextmanager
def text_lora(model: StableDiffusion, lora: Mapping[str, Tensor], strength: float) -> Iterator[None]:
    """Run the body with weights W + strength · B A in the text encoders; afterwards all weights are restored exactly.

    Raises:
        UserError: `lora` has a module that the text encoders lack, one of another shape, or a text encoder has an
            adapter already.
    """
    mine = {key: tensor for key, tensor in lora.items() if key.startswith("text_encoder")}
    parameters = parameters_of(model, mine)

    def values() -> Iterator[tuple[Tensor, Tensor]]:
        for module, (a, b) in factor_pairs(mine).items():
            weight = _weight(parameters, module)
            shape = (len(b), a[0].numel())
            if shape != tuple(weight.shape):
                raise UserError(
                    f"adapter module {module} changes {shape}, this base has {tuple(weight.shape)}: "
                    "it was made for another base"
                )
            change = strength * (b.float().flatten(1) @ a.float().flatten(1))
            yield weight, weight.float() + change.to(weight.device)

    with _replaced(values()):
        yield


@contextmanager
def other_changes(
    model: StableDiffusion, others: Mapping[str, Mapping[str, Tensor]], strength: float
) -> Iterator[None]:
    """Run the body with changes of other algorithms than LoRA in UNet and text encoders; then all is as before.

    The changes are listed in `model.changes` meanwhile, and `model.identity` stays that of the base.

    Raises:
        UserError: a module that the base does not have, one of another shape, or a part that has an adapter.
    """
    if not others:
        yield
        return
    parameters = parameters_of(model, others)

    def values() -> Iterator[tuple[Tensor, Tensor]]:
        for module, parts in others.items():
            weight, bias = _weight(parameters, module), parameters.get(f"{module}.bias")
            tensors = {role: tensor.to(weight.device) for role, tensor in parts.items()}
            new_weight, new_bias = changed(module, tensors, weight, bias, strength)
            yield weight, new_weight
            if bias is not None and new_bias is not None:
                yield bias, new_bias

    _ = model.identity  # computed before the weights change
    before = model.changes
    with _replaced(values()):
        model.changes = (*before, (others, strength))
        try:
            yield
        finally:
            model.changes = before


def parameters_of(model: StableDiffusion, wanted: Iterable[str]) -> dict[str, Tensor]:
    """The weights and biases of the parts that `wanted` names, by "<component>.<path>.weight" with canonical paths.

    Raises:
        UserError: a text encoder with an adapter, or a part whose weights are not there because they are offloaded.
    """
    parts = parts_of(model)
    named = {key.partition(".")[0] for key in wanted}
    found = {}
    for component in [component for component in parts if component in named]:
        if component != "unet":
            require_no_lora(parts[component], component)
        for name, parameter in parts[component].named_parameters():
            if parameter.device.type == "meta":
                raise UserError(
                    f"the weights of this pipeline's {component} are offloaded layer by layer: call "
                    "pipe.remove_all_hooks() and pipe.enable_model_cpu_offload() to use this adapter"
                )
            path = name.replace(".base_layer.", ".").replace("_orig_mod.", "")
            found[with_text_model(component, path)] = parameter
    return found


@contextmanager
def _replaced(values: Iterator[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Run the body with the new values of `values` in its parameters; afterwards they are what they were.

    The parameters may have moved meanwhile to another device, which gives them other storage.
    """
    before: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for parameter, value in values:
                before.append((parameter, parameter.detach().clone()))
                parameter.data.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for parameter, old in reversed(before):
                parameter.data.copy_(old)


def _weight(parameters: Mapping[str, Tensor], module: str) -> Tensor:
    if f"{module}.weight" not in parameters:
        raise UserError(f"this base has no layer {module}: the adapter was made for another base model")
    return parameters[f"{module}.weight"]
