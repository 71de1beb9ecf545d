"""Steps of sampling as replays of one CUDA graph (`cuda_graph`): the same pictures, without the host's time.

Small latents leave a GPU idle while the host starts its several thousand kernels a step.  The first steps are computed
as usual, one is then recorded, and the others replay it: both passes of guidance through the UNet, the guidance, and
with the DDIM formula the transition t → t′.  The steps of diffusers' schedulers decide on the host, so with these the
transition is computed outside of the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from personalize.errors import Notice, UserError
from personalize.models.conditioning import Conditioning
from personalize.models.cuda_graphs import WARM, called_on, recorded
from personalize.models.offloading import offloaded
from personalize.models.stable_diffusion import StableDiffusion
from personalize.models.transfer import sent
from personalize.sampling.schedule import Schedule, Step, Transition

LEVELS = ("timestep", "alpha", "alpha_next")  # the numbers of a transition that a recorded step reads on the device
Predict = Callable[..., Tensor]  # of latents, edit and step: the UNet's output after guidance
Move = Callable[..., Tensor]  # of that output, latents, edit and step: the next latents


def graphed(
    model: StableDiffusion, latents: Tensor, edit: Any, schedule: Schedule, predict: Predict, move: Move
) -> tuple[Predict, Move]:
    """`predict` and `move` as replays of one CUDA graph, of both or of the first; unchanged if a warning says why.

    edit: a `personalize.sampling.denoise.Edit`.  UserError if the model is on no CUDA device.
    """
    if reason := graph_obstacle(model, edit, schedule):
        warnings.warn(f"without a CUDA graph: {reason}", Notice, stacklevel=3)
        return predict, move
    whole = schedule.scheduler is None and not edit.latent_edits and all(map(_plain, schedule))

    def compute(z: Tensor, step: Step) -> Tensor:
        output = predict(z, edit, step)
        return move(output, z, edit, step) if whole else output

    steps = GraphedSteps(compute, latents, schedule)
    return (lambda z, *_: steps(z)), (lambda moved, *_: moved) if whole else move


class GraphedSteps:
    """Computes `step(latents, transition)` for one transition of a schedule after the other.

    Args:
        step: returns a tensor in the shape of the latents; of the transition it may use the numbers in LEVELS, which
            are tensors () here, and the flags `sigma` and `noise`, which are 0 and None.
        latents: those of the first step (b, c, h, w), on CUDA.
    """

    def __init__(self, step: Callable[[Tensor, Step], Tensor], latents: Tensor, schedule: Schedule) -> None:
        self.step, self.latents, self.result = step, latents.clone(), torch.empty_like(latents)
        self.levels = {name: _level(schedule, name, latents.device) for name in LEVELS}
        self.number = torch.zeros(1, dtype=torch.long, device=latents.device)
        self.stream = torch.cuda.Stream(latents.device)
        self.done, self.replay = 0, None

    def __call__(self, latents: Tensor) -> Tensor:
        """The result for the next transition."""
        self.latents.copy_(latents)
        if self.done < WARM:
            called_on(self.stream, self._compute)
        else:
            self.replay = self.replay or recorded(self._compute, latents.device)
            self.replay()
        self.done += 1
        return self.result.clone()

    def _compute(self) -> None:
        now: dict[str, Any] = {name: rows.index_select(0, self.number)[0] for name, rows in self.levels.items()}
        self.result.copy_(self.step(self.latents, Step(start=now["timestep"], end=now["timestep"], **now)))
        self.number += 1


def _level(schedule: Schedule, name: str, device: torch.device) -> Tensor:
    """The numbers `name` of all transitions (t), as a step that is not recorded writes them: int64 or fp32."""
    return sent(torch.tensor([getattr(transition, name) for transition in schedule.steps]), device)


def graph_obstacle(model: StableDiffusion, edit: Any, schedule: Schedule) -> str | None:
    """Why the steps of `edit` cannot be replays of a graph, or None if they can; UserError without a CUDA device.

    edit: a `personalize.sampling.denoise.Edit`.
    """
    if model.device.type != "cuda":
        raise UserError(f"cuda_graph needs a CUDA device, this is {model.device.type}")
    functions = [part for part in (edit.conditioning, edit.negative) if not isinstance(part, Conditioning | None)]
    obstacles = (
        (len(schedule) <= WARM + 1, f"{len(schedule)} steps are too few, the first {WARM} are never replayed"),
        (bool(edit.hooks), "the edit changes attention maps, which differs from step to step"),
        (bool(functions), "the prompt's embedding is computed anew at every step"),
        (not isinstance(edit.guidance_scale, int | float), "each picture has a guidance scale of its own"),
        (offloaded(model.unet), "the UNet's weights are moved from the host while it runs"),
    )
    return next((reason for hinders, reason in obstacles if hinders), None)


def _plain(transition: Transition) -> bool:
    """Whether the DDIM formula computes a transition without noise."""
    return not transition.sigma and transition.noise is None
