"""Options of how a training run is carried out, which do not decide the method; read before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from personalize.io.numbering import unused_folder
from personalize.models.config import BaseModelOptions


@dataclass(frozen=True, kw_only=True)
class RunOptions(BaseModelOptions):
    """Options of how a training run is carried out; they do not decide what is learned."""

    output_dir: Path = field(default_factory=lambda: unused_folder("adapter", "adapter.json"))
    """Where the adapter folder, its checkpoints and logs go; by default the first of adapter, adapter-2, … not done."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the forward pass; trained parameters and the loss are always fp32.  If not given, what `accelerate
    launch` says, or else "no", which is fp32."""
    load_in_4bit: bool = False
    """Keep the base UNet's linear layers in 4 bits (NF4) and its convolutions in bf16; for small cards."""
    checkpointing_steps: int | None = None
    """Updates between two checkpoints in output_dir/checkpoint-N; none if 0 or not given."""
    checkpoints_total_limit: int | None = None
    """Keep only this many of the newest checkpoints."""
    resume_from_checkpoint: str | None = None
    """Continue from a checkpoint folder, or from the "latest" whole one in output_dir."""
    validation_prompt: str | None = None
    """Draw pictures of this prompt while training, as `personalize edit` would."""
    num_validation_images: int = 4
    """Validation pictures drawn each time."""
    validation_steps: int = 20
    """Updates between two validations; with 0 there are none, but --keep_best scores the last update."""
    keep_best: bool = False
    """Save the weights whose validation pictures have the best score, those of the last update judged too."""
    clip_model: str | None = None
    """CLIP folder or hub id with which --keep_best scores the edit; only the embedded model needs none."""
    identity_model: str | None = None
    """How --keep_best scores identity: "alex" (the default) or "vgg" for LPIPS, or a DINOv2 folder or hub id."""
    preview_steps: int = 30
    """Denoising steps of validation pictures and of those on the model card; 0 draws none for the card."""
    report_to: Literal["tensorboard", "wandb", "comet_ml", "trackio", "all"] | None = None
    """Tracker for losses and rates, through Accelerate; tensorboard and wandb show validation pictures too."""
    logging_dir: str = "logs"
    """Folder of tracker files inside output_dir."""
    push_to_hub: bool = False
    """Also upload the adapter folder to the hub, as the user of `hf auth login`; with --person, a private one."""
    hub_model_id: str | None = None
    """Repository to upload to; named like output_dir if not given."""
    person: bool = False
    """The picture shows a recognisable person: the card says so, and asks for consent."""


# an option given: what a file says of the other, see `cli.parser`
ONE_CLASS_SOURCE = {"class_data_dir": "class_dataset_name", "class_dataset_name": "class_data_dir"}


@dataclass(frozen=True, kw_only=True)
class PriorPreservationOptions:
    """Options of prior preservation: class pictures, which keep the class word's meaning during training."""

    with_prior_preservation: bool = False
    """Train on class pictures too: from class_data_dir, class_dataset_name, or drawn by the base."""
    class_prompt: str | None = None
    """What class pictures show, e.g. "a photo of a dog"."""
    class_data_dir: Path | None = None
    """Folder of class pictures, with captions in .txt files beside them."""
    class_dataset_name: str | None = None
    """Data set of class pictures: a hub id or a local folder."""
    image_column: str = "image"
    """Column of pictures in data sets."""
    caption_column: str = "text"
    """Column of captions in data sets."""
    num_class_images: int = 100
    """How many class pictures to use, or to let the base draw."""
    class_image_steps: int = 50
    """Denoising steps of the class pictures that the base draws."""
    class_image_cache: Path | None = None
    """Where drawn class pictures are kept; ~/.cache/personalize if not given."""
