"""Learn several concepts from one picture, each under a word of its own (DisenDiff, arXiv 2403.18551).

    accelerate launch train/multi_concept.py pets.jpg --concepts "<cat1> cat" "<dog1> dog" --output_dir my-pets
    personalize train multi_concept pets.jpg --config sd15 --pretrained_model_name_or_path FOLDER …

Writes an adapter folder: LoRA files, one textual-inversion file per concept for each kind of program, a card.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from personalize.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from personalize.concept_learning import ConceptLearning


@dataclass(frozen=True)
class Config:
    picture: tyro.conf.Positional[Path | None] = None
    """The picture that shows the concepts; the square in its middle is used."""
    instance_data_dir: Path | None = None
    """A folder that holds the picture and nothing else that is one."""
    concepts: tuple[str, ...] = ()
    """For each concept its new word and what it is: "<cat1> cat" "<cup1> coffee cup"."""
    modifier_token: str | None = None
    """The new words alone, as "<cat1>+<dog1>"; what each is, is then the word behind it in --instance_prompt."""
    instance_prompt: str | None = None
    """What the picture shows, with every concept's words once; "photo of a <cat1> cat and <dog1> dog" if not given."""
    num_vectors: int = 1
    """Vectors (tokens) per concept."""
    initializer_token: str = "ktn+pll+ucd"
    """Words whose rows the new ones start from, in turn; "class": each from its own class words."""
    masks: tuple[Path, ...] = ()
    """A picture for each concept, white where it is, which anchors its attention there."""
    mask_weight: float | None = None
    """Weight of the masks; that of the calibration if not given."""
    output_dir: Path = Path("adapter")
    """Where the adapter folder, its checkpoints and logs go."""
    pretrained_model_name_or_path: str | None = None
    """Diffusers folder, hub id or single-file checkpoint; the embedded model if not given."""
    revision: str | None = None
    """Revision of a hub id."""
    variant: str | None = None
    """Variant of the weight files, e.g. fp16."""
    resolution: int | None = None
    """Side of the square in pixels; the base's own if not given."""
    with_prior_preservation: bool = True
    """Half of every batch are regularisation pictures: of class_data_dir, class_dataset_name, or drawn by the base."""
    class_data_dir: Path | None = None
    """Folder of regularisation pictures, captions in .txt files beside them."""
    class_dataset_name: str | None = None
    """Data set of regularisation pictures: a hub id or a local folder."""
    image_column: str = "image"
    """Its column of pictures."""
    caption_column: str = "text"
    """Its column of captions."""
    class_prompt: str | None = None
    """What regularisation pictures show; the instance prompt without the new words if not given."""
    num_class_images: int = 200
    """How many regularisation pictures to use, or to let the base draw."""
    class_image_steps: int = 50
    """Denoising steps of those the base draws."""
    class_image_cache: Path | None = None
    """Where drawn ones are kept; ~/.cache/personalize if not given."""
    prior_loss_weight: float = 1.0
    """Weight of the regularisation samples."""
    rank: int = 16
    """Rank of the LoRA on the keys and values of text attention."""
    lora_alpha: float | None = None
    """LoRA alpha, the strength being alpha / rank; the rank if not given."""
    full_kv: bool = False
    """Train those weights in full, and save the nearest LoRA; the adapter says what that misses."""
    learning_rate: float | None = None
    """Rate of the LoRA; 5e-4 if not given, 8e-5 with full_kv."""
    token_learning_rate: float = 5e-4
    """Rate of the new words' rows."""
    adam_weight_decay: float = 1e-2
    """AdamW's decay of the LoRA; the rows never decay."""
    calibration_weight: float = 0.0025
    """Weight of the attention losses against the mean squared error (0.01 in the paper's code); 0: Custom Diffusion."""
    augment: bool = True
    """Show the picture also far away and zoomed in, and say so in the prompt."""
    swap_subjects: float = 0.5
    """Share of samples whose prompt names the concepts in another order."""
    max_train_steps: int = 250
    """Updates to make."""
    train_batch_size: int = 2
    """Samples per batch and process, regularisation included."""
    gradient_accumulation_steps: int = 4
    """Batches per update."""
    gradient_checkpointing: bool = False
    """Compute activations anew in the backward pass: less memory, slower."""
    max_grad_norm: float | None = None
    """Clip the gradient to this norm; not clipped if not given."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the forward pass; LoRA, rows and losses are always fp32."""
    seed: int = 0
    """Seed of the LoRA, views, noise, timesteps and drawn pictures."""
    attention_maps: bool = False
    """Also write a picture of where each word looks, before and after."""
    checkpointing_steps: int | None = None
    """Updates between two checkpoints in output_dir/checkpoint-N; none if not given."""
    checkpoints_total_limit: int | None = None
    """Keep only this many of the newest checkpoints."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint folder, or from the "latest" whole one in output_dir."""
    report_to: Literal["tensorboard", "wandb", "comet_ml", "all"] | None = None
    """Tracker for losses and rates, through Accelerate."""
    logging_dir: str = "logs"
    """Folder of tracker files inside output_dir."""
    person: bool = False
    """The picture shows a recognisable person: the card says so, and asks for consent."""


def main(config: Config) -> Path:
    """Train and save the adapter; returns its folder."""
    from personalize.adapter import check_target
    from personalize.concept_learning import teaching
    from personalize.concept_training import Stages, accelerated, examples, read_picture, train
    from personalize.model import StableDiffusion

    picture, settings = read_picture(config), recipe(config)
    check_target(config.output_dir)
    accelerator: Accelerator = accelerated(config)
    model = StableDiffusion.load(
        config.pretrained_model_name_or_path, device=accelerator.device, dtype=dtype(config, accelerator),
        revision=config.revision, variant=config.variant,
    )  # fmt: skip
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.unet.train()
    prior = examples(config, model, picture, accelerator)
    with teaching(
        model, picture, settings, examples=prior, resolution=config.resolution, accelerator=accelerator
    ) as run:
        stages = Stages(run, picture, wanted=config.attention_maps)
        describe(run, accelerator)
        stages.look("before")
        train(config, run)
        stages.look("after")
        adapter = run.adapter(person=config.person, regularisation=len(prior))
    if accelerator.is_main_process:
        adapter.save(config.output_dir, pictures=stages.pictures())
        print(f"Words: {', '.join(adapter.concepts)}", f"Adapter: {config.output_dir}", sep="\n")
    accelerator.end_training()
    return config.output_dir


def recipe(config: Config) -> Any:
    """The part of the options that decides how the concepts are learned."""
    from personalize.concept_learning import ConceptRecipe

    values = {field.name: getattr(config, field.name) for field in fields(ConceptRecipe)}
    if config.mask_weight is None:
        values["mask_weight"] = config.calibration_weight if config.masks else 0.0
    elif config.mask_weight and not config.masks:
        raise UserError("mask_weight needs masks: name a picture for each concept with --masks")
    return ConceptRecipe(**values)


def dtype(config: Config, accelerator: Accelerator) -> Any:
    """The UNet's precision: bf16 halves its memory on an accelerator; under fp16 it stays fp32 behind autocast."""
    import torch

    half = config.mixed_precision == "bf16" and accelerator.device.type == "cuda" and not config.full_kv
    return torch.bfloat16 if half else torch.float32


def describe(run: ConceptLearning, accelerator: Accelerator) -> None:
    """Say what is learned from what, and which maps are read."""
    count = len(run.picture.examples)
    accelerator.print(f"“{run.caption}” at {run.size[1]}×{run.size[0]} px, {count} regularisation pictures")
    for name, size in run.map_layers.items():
        accelerator.print(f"calibrating {size} maps of {name}")


if __name__ == "__main__":
    from personalize.cli import run_script

    raise SystemExit(run_script(Config, main))
