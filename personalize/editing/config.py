"""Settings of the editing methods, which the options of the command line fill; read before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from personalize.errors import UserError
from personalize.models.ranges import check_ranges

if TYPE_CHECKING:
    from personalize.sampling.schedule import Step, Transition


@dataclass(frozen=True)
class UniformSettings:
    """How the auxiliary reconstruction is blended into an edit. Raises UserError for a value out of range.

    Args:
        until: T_mask as a share of the noise schedule: steps with 0 < t < until · 1000 are blended.
        quantile: q, in [0, 1], reached at the last step; a smaller value keeps less of the photo.
        threshold_scale: a difference is an edit if it exceeds `threshold_scale` · λ; with 1 nearly everything would be.
        dilate: radius by which the edited region is dilated, in latent cells.
        blend_source: also give the source's x̂0 the auxiliary estimate where a target is edited, as the paper does
            with mutual self-attention.
        auxiliary: how x̂0_u is computed. "u": sampled from the uniform inversion; "stored": sampled only below T_mask,
            from the inverted latents there; "z0": the encoded photo (blended latent diffusion, the control).
        reduce: None: one mask for each latent channel; "any" or "mean": one mask for all channels, where any of them
            or at least half of them is edited.
    """

    until: float = 0.2
    quantile: float = 0.5
    threshold_scale: float = 2.0
    dilate: int = 1
    blend_source: bool = False
    auxiliary: Literal["u", "stored", "z0"] = "u"
    reduce: Literal["any", "mean"] | None = None

    def __post_init__(self) -> None:
        check_ranges(self)

    def blends(self, step: Transition) -> bool:
        """Whether this step is blended: 0 < t < T_mask."""
        return 0 < step.start < self.until * 1000

    def quantile_at(self, step: Step) -> float:
        """q·i/(S−1), with i the number of the step and S the number of steps."""
        return self.quantile * step.index / max(1, step.count - 1)


@dataclass(frozen=True)
class ControlSettings:
    """How long and how the target gets the source's attention; shares are of all steps. UserError out of range."""

    mode: Literal["auto", "replace", "refine"] = "auto"
    """replace: word for word, in prompts of equally many words; refine: words are inserted or removed; auto: replace if
    words were only exchanged for as many others, else refine."""
    cross_replace_steps: float = 0.8
    """Share of the steps in which the target gets the source's cross-attention maps."""
    self_replace_steps: float = 0.5
    """Share of the steps in which the target gets the source's self-attention maps."""
    self_max_side: int = 48
    """Self-attention layers are changed if their maps have at most this side when the base is used at its own square
    size: SD 1's 32 and SD 2's 48 are the same layers (11 of 16), below SDXL's 64 are 60 of 70. The papers' limit of
    1024 positions is a side of 32 on SD 1."""
    bind_adjectives: bool = True
    """Words inserted before a noun get the noun's map; only in mode refine."""
    word_steps: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """For single words of the target, in place of `cross_replace_steps`: (first share, last share) of the steps."""
    blend_threshold: float = 0.3
    """Local blend: a word's region is where its map is at least this share of its maximum."""
    blend_start: float = 0.2
    """Local blend: the share of the steps before it begins."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class DynamicSettings:
    """How the embeddings of nouns are fitted. Raises UserError for a value out of range."""

    updates: int = 21
    """Maximum number of updates at each step; 0 fits nothing."""
    rate: float = 1e-3
    """Learning rate of AdamW."""
    balancing: float = 1.0
    """λ_at: weight of the balancing loss: each noun must dominate the other words somewhere."""
    disjoint: float = 0.05
    """λ_dj: weight of the disjoint loss: nouns must not overlap. Published runs used 0.005 to 0.2, by image."""
    background: float = 0.05
    """λ_bg: weight of the background loss: nouns must not attend to the background."""
    words_only: bool = False
    """Leave the padding out of the softmax of the balancing loss, unlike the paper. For base models that attend mostly
    to the padding, so that no word could dominate."""
    balancing_limit: float | None = None
    """Threshold of the balancing loss at every step; None is the published 0.3 exp(−i/25). For base models that attend
    mostly to the padding, where nouns whose maps are good stay above the published one."""
    cap: float | None = None
    """Limit on ‖v − v₀‖ / ‖v₀‖, the distance of an embedding from the word's; None is no limit."""
    gradient_checkpointing: bool = False
    """Keep the inputs of blocks instead of all activations: less memory, more time, the same result."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.rate == 0:
            raise UserError("dynamic prompts take a positive rate, got 0")

    @property
    def idle(self) -> bool:
        """Whether nothing is fitted."""
        return self.updates == 0 or not (self.balancing or self.disjoint or self.background)

    @property
    def inputs(self) -> dict[str, object]:
        """The settings that the result depends on."""
        return {name: value for name, value in vars(self).items() if name != "gradient_checkpointing"}


@dataclass(frozen=True)
class Sampling:
    """How images are sampled.

    scheduler: a name in `personalize.sampling.config.SCHEDULERS`.
    guidance_scale: as in diffusers, up to 1 is off; None is the base model's, by `personalize.editing.defaults`.
    size: height and width in pixels; None is that of the picture (or caption) that an edit starts from.
    torch_compile: compile the UNet's repeated blocks: faster for many pictures; they differ by rounding.
    cuda_graph: replay the steps from one CUDA graph: the same pictures in less time; not with torch_compile.
    """

    steps: int = 50
    scheduler: str = "ddim"
    guidance_scale: float | None = None
    size: tuple[int, int] | None = None
    torch_compile: bool = False
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.torch_compile and self.cuda_graph:
            raise UserError("cuda_graph does not go with torch_compile: choose one of them")


@dataclass(frozen=True)
class EditStrengths:
    """The strengths of one edit.

    alpha, beta: weights of the source and of the edit in vector projection.
    gamma: the share of the prompt in vector subtraction, which takes the place of projection if it is given.
    forget: forgetting rules joined by "+", or "none".
    strength: factor on the whole adapter.
    """

    alpha: float = 0.8
    beta: float = 1.2
    gamma: float | None = None
    forget: str = "none"
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_ranges(self)

    def __str__(self) -> str:
        mix = f"alpha {self.alpha:g}  beta {self.beta:g}" if self.gamma is None else f"gamma {self.gamma:g}"
        forgotten = "" if self.forget == "none" else f"  forget {self.forget}"
        return mix + forgotten + ("" if self.strength == 1 else f"  strength {self.strength:g}")


DEFAULT_SAMPLING, DEFAULT_STRENGTHS = Sampling(), EditStrengths()
CONTROL, DYNAMIC, UNIFORM = ControlSettings(), DynamicSettings(), UniformSettings()  # the defaults
