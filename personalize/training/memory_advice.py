"""What to change if a training needs more memory than is free: the options that are enough, the cheapest ones first.

option                      takes less of                                 costs
--mixed_precision bf16      the base and activations, half                rounding
--offload                   text encoders, autoencoder, its pictures      seconds for each preview
--train_batch_size 1        activations of all samples but one            time on a GPU
--use_8bit_adam             the optimizer's moments, three quarters       hardly anything
--gradient_checkpointing    activations, most of them                     a third more time
--load_in_4bit              the UNet's linear layers, three quarters      a coarser base under the adapter
--resolution N              activations, by the pixels                    detail
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from personalize.models.gradient_checkpointing import gradient_checkpointing
from personalize.models.memory import decoding_bytes, free_bytes
from personalize.models.quantization import saved_by_quantizing, weight_bytes
from personalize.models.vae import TILE
from personalize.training.memory_estimate import MemoryEstimate, eight_bit, readable, sample_bytes, unturned

if TYPE_CHECKING:
    from personalize.training.run import TrainingRun

Change = Callable[[MemoryEstimate], MemoryEstimate]  # what an estimate becomes with an option


def check_fits(expected: MemoryEstimate, run: TrainingRun) -> str | None:
    """A sentence of advice if `expected` exceeds the free memory; None if it fits."""
    free = free_bytes(run.model.device)
    if free is None:
        return None
    room = free + expected.base + expected.adapter  # these two are allocated already
    if _most(expected) <= room:
        return None
    need = f"about {readable(_most(expected))} are needed and {readable(room)} are there"
    changes = {option: make(run) for option, make in _MAKERS.items() if option in unturned(run)}
    chosen = _enough(expected, changes, room)
    least = _most(_with(expected, changes.values()))
    if chosen is None and (side := _resolution(_with(expected, changes.values()), run, room)):
        return f"{need}: add {' '.join([*changes, f'--resolution {side}'])}"
    if chosen is None:
        return f"{need}, and still {readable(least)} with {' '.join(changes) or 'all that saves memory'}: " \
               "it takes a device with more memory"  # fmt: skip
    kept = _most(_with(expected, [changes[option] for option in chosen]))
    return f"{need}: add {' '.join(chosen)}, with which {readable(kept)} are needed"


def _most(expected: MemoryEstimate) -> int:
    """The most that is needed from now on: encoding is over."""
    return max(expected.updates, expected.decoding)


def _with(expected: MemoryEstimate, changes: Iterable[Change]) -> MemoryEstimate:
    for change in changes:
        expected = change(expected)
    return expected


def _enough(expected: MemoryEstimate, changes: Mapping[str, Change], room: int) -> list[str] | None:
    """The options that make the estimate fit: from the cheapest on, without those that it fits without; None if none.

    Those are looked for from the costliest on, so that a costly option goes before a cheap one does.
    """
    names = list(changes)
    for count in range(1, len(names) + 1):
        if _most(_with(expected, [changes[name] for name in names[:count]])) <= room:
            chosen = names[:count]
            for name in reversed(names[:count]):
                others = [one for one in chosen if one != name]
                if _most(_with(expected, [changes[one] for one in others])) <= room:
                    chosen = others
            return chosen
    return None


def _halved(run: TrainingRun) -> Change:
    parts = [p for p in (run.model.unet, run.model.vae, *run.model.text_encoders) if p not in run.model.offload]
    frozen = sum(p.numel() * p.element_size() for part in parts for p in part.parameters() if not p.requires_grad)

    def change(found: MemoryEstimate) -> MemoryEstimate:
        halves = {name: getattr(found, name) // 2 for name in ("sample", "idle_vae", "idle_encoders")}
        return replace(found, base=found.base - frozen // 2, decoding_picture=found.decoding_picture // 2, **halves)

    return change


def _offloaded(run: TrainingRun) -> Change:
    model, encodes = run.model, getattr(run.config, "encodes_captions", False)
    vae = 0 if model.vae in model.offload else weight_bytes(model.vae)
    encoders = [one for one in model.text_encoders if not encodes and one not in model.offload]
    texts = sum(map(weight_bytes, encoders))
    tiled = decoding_bytes(model.vae, (min(run.size[0], TILE), min(run.size[1], TILE)))
    return lambda found: replace(
        found, base=found.base - vae - texts, idle_vae=found.idle_vae + vae, idle_encoders=found.idle_encoders + texts,
        decoding_picture=min(found.decoding_picture, tiled),
    )  # fmt: skip


def _eight_bits(run: TrainingRun) -> Change:
    moments = sum(eight_bit(parameter.numel()) for parameter in run.objective.trainable().values())
    return lambda found: replace(found, optimizer=moments)


def _checkpointed(run: TrainingRun) -> Change:
    with gradient_checkpointing(run.model.unet):
        least = sample_bytes(run)
    return lambda found: replace(found, sample=min(found.sample, least))


_MAKERS: dict[str, Callable[[TrainingRun], Change]] = {  # in order of what they cost
    "--mixed_precision bf16": _halved,
    "--offload": _offloaded,
    "--train_batch_size 1": lambda run: lambda found: replace(found, batch=1),
    "--use_8bit_adam": _eight_bits,
    "--gradient_checkpointing": _checkpointed,
    "--load_in_4bit": lambda run: lambda found: replace(found, base=found.base - saved_by_quantizing(run.model.unet)),
}


def _resolution(found: MemoryEstimate, run: TrainingRun, room: int) -> int | None:
    """The largest resolution with which `found` fits; None if it would be less than half of the present one."""
    multiple, side = 8 * run.model.factor, math.sqrt(run.size[0] * run.size[1])
    share = (room - (found.updates - found.activations)) / found.activations
    largest = int(side * math.sqrt(max(0.0, min(1.0, share)))) // multiple * multiple
    return largest if largest >= side / 2 and found.decoding <= room else None
