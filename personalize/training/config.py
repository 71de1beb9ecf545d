"""The options of the trainers that decide what is learned: those that all share, and a configuration for each.

The fields have the names of diffusers' own training scripts.  A trainer's `Config` inherits from the classes here and
in `run_options`, so that every option is defined once.  Read before torch is imported: this module must import nothing
heavy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from personalize.errors import UserError
from personalize.models.ranges import check_ranges

ConfigT = TypeVar("ConfigT", bound="LoraTrainingConfig")

NO_DORA = (
    "of a DoRA diffusers drops kohya's dora_scale, and sd-scripts reads it only with lycoris-lora, so that they would "
    "draw another change than was trained; leave it out: LoRA with --use_rslora is read by all"
)


@dataclass(frozen=True, kw_only=True)
class LoraTrainingConfig:
    """Settings of every training configuration."""

    samples_per_update: int | None = None
    """Samples whose mean loss makes one update, over all processes and however they are batched.  If not given: with
    gradient_accumulation_steps as in diffusers' scripts, or else 10 (multi_concept: 8)."""
    train_batch_size: int = 10
    """Most samples that a process takes at a time: less memory, the same updates."""
    gradient_accumulation_steps: int | None = None
    """Batches per update and process.  Without samples_per_update, an update then has train_batch_size samples of each
    batch, of every process, as in diffusers' scripts; with it, the three must fit together."""
    random_flip: bool = False
    """Show every second sample mirrored; not for subjects with text, logos or sides that differ."""
    rank: int = 16
    """Rank of the LoRA."""
    lora_alpha: float | None = None
    """LoRA alpha, the strength being alpha / rank; the rank if not given."""
    use_rslora: bool = False
    """Rank-stabilised LoRA: the strength is alpha / √rank; in files alpha is larger, so that every reader has it."""
    use_ema: bool = False
    """Save the exponential moving average of what is trained, not the state after the last update."""
    ema_max_decay: float = 0.9999
    """With use_ema: the most that the average keeps at an update; early updates keep n / (n + 9) after n of them."""
    min_rank: int | None = None
    """Timestep-dependent rank: at the highest noise only this many components learn, at the lowest all of the rank."""
    alpha_rank_scale: float = 1.0
    """With min_rank: the exponent by which the number of components falls towards high noise; 1 is linear."""
    orthogonal_start: bool = False
    """Start the LoRA from orthonormal components that cancel; in files it has twice the rank."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, but slower."""
    torch_compile: bool = False
    """Compile the UNet's repeated blocks at the first update; meant for GPUs, and for runs of many updates."""
    use_8bit_adam: bool = False
    """Keep the optimizer's moments in 8 bits (bitsandbytes)."""
    prior_loss_weight: float = 1.0
    """With class pictures: weight of their loss."""
    lr_scheduler: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = "constant"
    """How the learning rates change over the updates; cosine_with_restarts makes one cycle, as cosine."""
    lr_warmup_steps: int = 0
    """Updates over which the learning rates rise from 0."""
    max_grad_norm: float | None = None
    """Clip the gradient to this norm; not clipped if not given."""
    seed: int = 0
    """Seed of everything random: LoRA, latents or views, noise, timesteps, class pictures."""

    def __post_init__(self) -> None:
        check_ranges(self)
        _positive(self, "lora_alpha", "max_grad_norm", "alpha_rank_scale")
        if self.min_rank is not None and not 1 <= self.min_rank <= self.rank:
            raise UserError(f"min_rank must be from 1 to the rank, {self.rank}, got {self.min_rank}")

    refused = dict.fromkeys(("use_dora", "dora_wd", "weight_decompose"), NO_DORA)  # diffusers', LyCORIS's names for it
    replaces = {"gradient_accumulation_steps": "samples_per_update"}  # an option given: what a file says of the other

    @property
    def usual_update(self) -> int:
        """Samples of an update if no option says how many."""
        return 10

    def update_samples(self, processes: int = 1) -> int:
        """The number of samples whose mean loss makes one update, in a run of so many processes."""
        if self.samples_per_update is not None:
            return self.samples_per_update
        steps = self.gradient_accumulation_steps
        return self.usual_update if steps is None else self.train_batch_size * steps * processes

    @property
    def alpha(self) -> float:
        """Alpha so that alpha / rank is the strength, which other programs read from files."""
        alpha = float(self.rank if self.lora_alpha is None else self.lora_alpha)
        return alpha * math.sqrt(self.rank) if self.use_rslora else alpha

    @property
    def file_rank(self) -> int:
        """The rank that the LoRA has in files: twice the trained one after an orthogonal start."""
        return 2 * self.rank if self.orthogonal_start else self.rank

    @property
    def file_alpha(self) -> float:
        """The alpha that the LoRA has in files, so that alpha / rank is the trained one."""
        return 2 * self.alpha if self.orthogonal_start else self.alpha


@dataclass(frozen=True, kw_only=True)
class SingleImageConfig(LoraTrainingConfig):
    """Configuration of single-image training; the defaults are those of the method.

    An update uses `samples_per_update` samples, so for one picture the defaults make 400 // 10 = 40 updates; for p
    pictures the samples are max(min_train_samples, p · samples_per_picture), unless max_train_samples gives their
    number.  Neither depends on the number of processes or on `train_batch_size`; only with
    `gradient_accumulation_steps` and without `samples_per_update` an update has as many samples as in diffusers'
    scripts, see `update_samples`.
    """

    targets: Literal["full", "attention"] = "full"
    """Modules tuned: every linear layer and convolution of the tuned blocks, or only their attentions."""
    learning_rate: float = 1e-3
    """Learning rate of the LoRA."""
    text_embedding_lr: float = 1e-3
    """Learning rate of the source embedding, or of the instance_token's."""
    standalone: bool = False
    """Train no source embedding, for programs that cannot load one; reconstructs less exactly."""
    train_text_encoder: bool = False
    """Train a LoRA in the text encoders instead of a source embedding, as DreamBooth does.  An embedding that is free
    would take the place of their output, so that they would learn nothing: only one of the two is trained."""
    text_encoder_lr: float = 1e-4
    """Learning rate of the text encoders' LoRA."""
    instance_token: str | None = None
    """A new word for the subject, in every caption: "<rex>", or "<rex> dog" to say what its embedding starts from.  The
    embedding is learned in the place of a source embedding, at text_embedding_lr, and saved in files of its own."""
    max_train_samples: int | None = None
    """Samples (noisy copies of the pictures) to train on, over all processes; by the next two if not given."""
    min_train_samples: int = 400
    """Samples to train on if there is one picture, or a few: 400 in updates of 10 make 40 updates."""
    samples_per_picture: int = 200
    """Samples for each picture, if these are more than min_train_samples in all."""
    train_batch_size: int = 10
    """Most samples that a process takes at a time; with prior preservation, as many class pictures are added."""
    offload: bool = False
    """Decode in tiles, and on a CPU too keep text encoders and VAE elsewhere (in a file) while they are not used."""
    cuda_graph: bool = False
    """Replay each update as one CUDA graph, which saves the time of launching kernels; one process only."""
    resample_latents: bool = False
    """Draw latents from the picture's posterior anew for each sample, instead of once."""
    mask_weight: float = 0.9
    """With a mask: how much less the loss counts outside it; 1 ignores the outside, 0 ignores the mask."""
    snr_gamma: float | None = None
    """Gamma of the min-SNR weighting of the loss, usually 5; no weighting if not given."""
    proportion_empty_prompts: float = 0.0
    """Share of the samples that are learned without their caption, as guidance has it (caption dropout)."""
    early_stop_loss: float | None = None
    """Stop after 350 samples once an update's loss is below this; the paper uses 0.03."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "max_train_samples", "min_train_samples", "samples_per_picture")
        _positive(self, "learning_rate", "text_encoder_lr", "snr_gamma", "early_stop_loss")
        _fraction(self, "mask_weight")
        if self.instance_token is not None and not self.text_embedding_lr:
            raise UserError("instance_token is learned at text_embedding_lr, which is 0: give a rate, or no token")
        if self.text_encoder_lr != type(self).text_encoder_lr and not self.train_text_encoder:
            raise UserError("text_encoder_lr needs train_text_encoder, without which no text encoder learns: add it")

    def train_samples(self, pictures: int = 1) -> int:
        """The number of samples that a run on so many pictures trains on."""
        return self.max_train_samples or max(self.min_train_samples, pictures * self.samples_per_picture)

    @property
    def encodes_captions(self) -> bool:
        """Do the text encoders run in every update, because something in them learns?"""
        return self.train_text_encoder or self.instance_token is not None

    @property
    def source_embedding_frozen(self) -> bool:
        """Is the source embedding left at the text encoder's output?"""
        return self.without_source_embedding or self.encodes_captions

    @property
    def without_source_embedding(self) -> bool:
        """Has the adapter no source embedding?  If the encoders run in updates, it has their output for the caption."""
        return self.standalone or (self.text_embedding_lr == 0 and not self.encodes_captions)


CALIBRATION_WEIGHT = 0.0025


@dataclass(frozen=True, kw_only=True)
class MultiConceptConfig(LoraTrainingConfig):
    """Configuration of multi-concept training, by LoRA on the keys and values of cross-attention.

    The defaults are those of the method.

    An update uses `update_samples` samples, with class pictures every second one of these; only with
    `gradient_accumulation_steps` and without `samples_per_update` their number depends on that of the processes.
    `calibration_weight` is relative to a mean squared error, see `MultiConceptObjective`; 0 is Custom Diffusion.
    """

    full_kv: bool = False
    """Train the keys' and values' weights in full and save the nearest LoRA; adapter.json has the error of that."""
    learning_rate: float | None = None
    """Learning rate of the LoRA; 5e-4 if not given, 8e-5 with full_kv."""
    token_learning_rate: float = 5e-4
    """Learning rate of the new tokens' embeddings."""
    adam_weight_decay: float = 1e-2
    """AdamW's weight decay of the LoRA; token embeddings never decay."""
    max_train_steps: int = 250
    """Updates to make."""
    train_batch_size: int = 2
    """Most samples that a process takes at a time: less memory, the same updates."""
    calibration_weight: float = CALIBRATION_WEIGHT
    """Weight of the attention losses against the mean squared error (0.01 in the paper's code); 0: Custom Diffusion."""
    mask_weight: float | None = None
    """Weight of the masks' loss; that of the calibration if not given."""
    initializer_token: str = "ktn+pll+ucd"
    """Words the tokens' embeddings start from, the last token's from the first word; "class": from its class words."""
    augment: bool = True
    """Show the picture also shrunk and zoomed in, with "far away" or "close up" in the prompt."""
    swap_subjects: float = 0.5
    """Fraction of samples whose prompt names the concepts in another order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "learning_rate")
        shape = (self.min_rank is not None, self.orthogonal_start, self.use_rslora, self.lora_alpha is not None)
        if self.full_kv and any(shape):
            raise UserError(
                "full_kv trains no LoRA, so that min_rank, orthogonal_start, use_rslora and lora_alpha mean nothing: "
                "leave one out"
            )
        if not all(map(str.strip, self.initializer_token.split("+"))):
            raise UserError(f"initializer_token {self.initializer_token!r} has an empty word: write e.g. ktn+pll")

    @property
    def usual_update(self) -> int:
        return 8

    @property
    def alpha(self) -> float:
        return float(self.rank) if self.full_kv else super().alpha

    @property
    def weight_learning_rate(self) -> float:
        """The learning rate of the LoRA, or with `full_kv` of the full weights."""
        return self.learning_rate or (8e-5 if self.full_kv else 5e-4)

    @property
    def anchoring_weight(self) -> float:
        """The weight of the masks' loss, if there are masks."""
        return self.calibration_weight if self.mask_weight is None else self.mask_weight

    @property
    def early_stop_loss(self) -> None:
        """None: multi-concept runs never stop early, for the loss says little about likeness."""

    @property
    def cuda_graph(self) -> bool:
        """False: a batch's contents, and so the maps that are read, differ from update to update."""
        return False

    def initializer(self, index: int, count: int) -> str:
        """The word whose embedding concept `index` of `count` starts from; "class" stands for its own class phrase.

        As in the authors' code the last concept starts from the first word, and those before it from the next ones.
        """
        words = self.initializer_token.split("+")
        return words[(count - 1 - index) % len(words)]


def check_warmup(config: Any, updates: int) -> None:
    """UserError if the learning rates would rise over all of so many updates, or over more."""
    if 0 < config.lr_warmup_steps >= updates:
        raise UserError(f"lr_warmup_steps {config.lr_warmup_steps} must be below the number of updates, {updates}")


def extract_config(options: Any, kind: type[ConfigT], **changes: Any) -> ConfigT:
    """The training configuration, of class `kind`, among a trainer's options; `changes` override some of its fields."""
    return kind(**{field.name: getattr(options, field.name) for field in fields(kind)} | changes)


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if (value := getattr(config, name)) is not None and not value > 0:
            raise UserError(f"{name} must be above 0, got {value}")


def _fraction(config: Any, name: str) -> None:
    if not 0 <= getattr(config, name) <= 1:
        raise UserError(f"{name} is a fraction from 0 to 1, got {getattr(config, name)}")
