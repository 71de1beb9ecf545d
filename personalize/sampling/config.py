"""Settings of inversion and null-text optimisation, which options fill; read before torch is imported."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from personalize.errors import UserError
from personalize.models.ranges import check_ranges

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # diffusers' class, and settings of it
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
}
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
"""Settings of other spacings of the noise levels, which a base's own scheduler may have: a name says which it has."""
INVERSIONS = "trajectories"  # the folder in an output folder that keeps inversions for later edits
TRAJECTORY = "trajectory.json"  # the file by which a folder is known to hold a stored inversion
STRENGTH = {"ddpm": 0.64}  # the paper skips the noisiest 36 of 100 steps


@dataclass(frozen=True)
class NullTextSettings:
    """How null embeddings are fitted. Raises UserError for a value out of range."""

    iterations: int = 10
    """Maximum number of updates at each step."""
    rate: float = 1e-2
    """Learning rate of the first step; at step i of T it is multiplied by 1 − i/(2T)."""
    tolerance: float = 1e-5
    """The updates of a step end as soon as its loss is below `tolerance` + `growth` · i, i being the step's number."""
    growth: float = 2e-5
    """For 50 steps; with T steps it is multiplied by 50/T. 0 asks the same loss of every step."""
    warm_start: bool = True
    """Start each step at the embedding fitted for the previous one, instead of the empty prompt."""

    gradient_checkpointing: bool = False
    """Compute the UNet's blocks again for the backward pass instead of keeping them: less memory, same result."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.iterations == 0 or self.rate == 0:
            raise UserError(f"null-text takes iterations from 1 and a positive rate, got {self}")

    @property
    def inputs(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON values."""
        return {name: value for name, value in asdict(self).items() if name != "gradient_checkpointing"}


NULL_TEXT = NullTextSettings()
