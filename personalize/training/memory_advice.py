"""What to change if a training needs more memory than is free: the options that are enough, the cheapest ones first.

    option                      takes less of                                 costs
    --mixed_precision bf16      the UNet and activations, half                rounding
    --offload                   text encoders, autoencoder, its pictures      seconds for each preview
    --train_batch_size 1        activations of all samples but one            time on a GPU
    --use_8bit_adam             the optimizer's moments, three quarters       hardly anything
    --gradient_checkpointing    activations, most of them                     a third more time
    --load_in_4bit              the UNet's linear layers, to 4 bits           a coarser base under the adapter
    --resolution N              activations, by the pixels                    detail

Only options that are not given yet are advised, and none that it fits without.  On GPUs that do not compute in bf16
it is fp16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from personalize.models.gradient_checkpointing import gradient_checkpointing
from personalize.models.memory import free_bytes
from personalize.models.quantization import saved_by_quantizing, weight_bytes
from personalize.training.memory_estimate import (
    MemoryEstimate,
    adam_8bit_bytes,
    decoded_bytes,
    frozen_weights,
    readable,
    sample_bytes,
    unused_savings,
)
from personalize.training.single_image import idle_parts

if TYPE_CHECKING:
    from personalize.training.run import TrainingRun

Change = Callable[[MemoryEstimate], MemoryEstimate]  # what an estimate becomes with an option


def check_fits(expected: MemoryEstimate, run: TrainingRun) -> str | None:
    """A sentence of advice if `expected` exceeds the free memory; None if it fits."""
    free = free_bytes(run.model.device)
    if free is None:
        return None
    room = free + expected.base + expected.adapter + expected.copies  # these are allocated already
    if _most(expected) <= room:
        return None
    need, changes = f"about {readable(_most(expected))} are needed and {readable(room)} are there", dict[str, Change]()
    for option in unused_savings(run):
        changes[option] = _MAKERS[option](run)
        if _most(_with(expected, changes.values())) <= room:
            changes = _needed(expected, changes, room)
            kept = readable(_most(_with(expected, changes.values())))
            return f"{need}: add {' '.join(changes)}, with which {kept} are needed"
    least = _with(expected, changes.values())
    if side := _resolution(least, run, room):
        return f"{need}: add {' '.join([*changes, f'--resolution {side}'])}"
    options = " ".join(changes) or "all that saves memory"
    return f"{need}, and still {readable(_most(least))} with {options}: it takes a device with more memory"


def _most(expected: MemoryEstimate) -> int:
    """The most that is needed from now on: encoding is over."""
    return max(expected.updates, expected.decoding)


def _with(expected: MemoryEstimate, changes: Iterable[Change]) -> MemoryEstimate:
    for change in changes:
        expected = change(expected)
    return expected


def _needed(expected: MemoryEstimate, changes: dict[str, Change], room: int) -> dict[str, Change]:
    """`changes` without those that the estimate fits without, of which the costliest are left out first."""
    for option in reversed(list(changes)):
        others = {name: change for name, change in changes.items() if name != option}
        if _most(_with(expected, others.values())) <= room:
            changes = others
    return changes


def _halved(run: TrainingRun) -> Change:
    """Of the base the UNet alone has the lower precision: text encoders and autoencoder are always fp32."""
    frozen = frozen_weights(run.model.unet)
    smaller = _with_unet(2 * sum(weight.numel() for weight in frozen))
    return lambda found: replace(smaller(found), sample=found.sample // 2)


def _quantized(run: TrainingRun) -> Change:
    """Whatever it was before: what is not in 4 bits is in 16."""
    frozen = 2 * sum(weight.numel() for weight in frozen_weights(run.model.unet))
    return _with_unet(frozen - saved_by_quantizing(run.model.unet, 2))


def _with_unet(count: int) -> Change:
    """The change of an estimate to a UNet whose frozen weights take `count` bytes, if they do not take less."""

    def change(found: MemoryEstimate) -> MemoryEstimate:
        smaller = min(found.unet, count)
        return replace(found, base=found.base - found.unet + smaller, unet=smaller)

    return change


def _offloaded(run: TrainingRun) -> Change:
    model = run.model
    leaving = [part for part in idle_parts(model, run.config) if part not in model.offload]
    vae, texts = (
        sum(weight_bytes(part) for part in some if part in leaving) for some in ([model.vae], model.text_encoders)
    )
    tiled = decoded_bytes(run, tiled=True)
    return lambda found: replace(
        found, base=found.base - vae - texts, idle_vae=found.idle_vae + vae, idle_encoders=found.idle_encoders + texts,
        decoding_picture=min(found.decoding_picture, tiled),
    )  # fmt: skip


def _eight_bits(run: TrainingRun) -> Change:
    moments = sum(adam_8bit_bytes(parameter.numel()) for parameter in run.objective.trainable().values())
    return lambda found: replace(found, optimizer=moments)


def _checkpointed(run: TrainingRun) -> Change:
    with gradient_checkpointing(run.model.unet):
        least = sample_bytes(run)
    return lambda found: replace(found, sample=min(found.sample, least))


_MAKERS: dict[str, Callable[[TrainingRun], Change]] = {
    "--mixed_precision bf16": _halved, "--mixed_precision fp16": _halved,
    "--offload": _offloaded,
    "--train_batch_size 1": lambda run: lambda found: replace(found, batch=1),
    "--use_8bit_adam": _eight_bits,
    "--gradient_checkpointing": _checkpointed,
    "--load_in_4bit": _quantized,
}  # fmt: skip


def _resolution(found: MemoryEstimate, run: TrainingRun, room: int) -> int | None:
    """The largest resolution with which `found` fits; None if it would be less than half of the present one."""
    multiple, side = 8 * run.model.factor, math.sqrt(run.size[0] * run.size[1])
    share = (room - (found.updates - found.activations)) / found.activations
    largest = int(side * math.sqrt(max(0.0, min(1.0, share)))) // multiple * multiple
    return largest if largest >= side / 2 and found.decoding <= room else None
