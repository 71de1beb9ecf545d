"""Learn one picture: everything between a loaded base model and a finished adapter.

    with learning(model, pixels, "a photo of a dog", Recipe(rank=8)) as run:
        for report in run.steps():
            print(report.update, float(report.losses["loss"]))
        adapter = run.adapter()

`learn` does the same in one call.  The trainer, the quick start and the editor all come through here.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from personalize import __version__, checkpoints
from personalize.adapter import Adapter
from personalize.captured import replay
from personalize.checkpoints import Checkpoint
from personalize.concept_data import ClassImage, class_pixels, digest
from personalize.data import LatentDataset, SampleShard
from personalize.errors import UserError
from personalize.formats import diffusers_file
from personalize.lean import fast_paths, in_precision
from personalize.lora import add_lora, lora_aside, lora_state, module_names
from personalize.model import StableDiffusion
from personalize.objectives import SingleImageObjective
from personalize.recipes import SingleImageConfig
from personalize.text_lora import add_text_lora, text_lora_state
from personalize.training import (
    EarlyStop,
    StepReport,
    adamw,
    gradient_checkpointing,
    restored,
    set_autocast,
    training_dtype,
    training_steps,
)  # fmt: skip

# between a run and its resumption
MAY_DIFFER = ("max_train_samples", "max_train_steps", "gradient_checkpointing", "cuda_graph")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
Captions = str | Sequence[str]  # one for all pictures, or one each


@contextmanager
def single_image_run(
    model: StableDiffusion,
    pixels: Tensor,
    caption: Captions,
    recipe: SingleImageConfig | None = None,
    *,
    masks: Tensor | None = None,
    examples: Sequence[ClassImage] = (),
    accelerator: Accelerator | None = None,
) -> Iterator[SingleImageRun]:
    """A run that learns `pixels` (p, 3, H, W) in [−1, 1] as `caption`; on leaving, `model` is as it was.

    masks: (p, 1, H, W) in [0, 1], where the subject is; see `SingleImageConfig.mask_weight`.
    examples: class pictures with their captions, for prior preservation; cut to H×W.

    Raises:
        UserError: settings that cannot work, or a model that already carries an adapter.
    """
    recipe = recipe or SingleImageConfig()
    with (
        restored(model), in_precision(model.unet, training_dtype(model, accelerator)), fast_paths(model.unet),
        gradient_checkpointing(model.unet, recipe.gradient_checkpointing),
    ):  # fmt: skip
        run = SingleImageRun(model, pixels, caption, recipe, masks, examples, accelerator)
        run.adapt()
        yield run


def learn(
    model: StableDiffusion,
    pixels: Tensor,
    caption: Captions,
    recipe: SingleImageConfig | None = None,
    *,
    accelerator: Accelerator | None = None,
) -> Adapter:
    """Learn `pixels` (p, 3, H, W) in [−1, 1] as `caption`, silently, and return the adapter; see `single_image_run`."""
    with single_image_run(model, pixels, caption, recipe, accelerator=accelerator) as run:
        for _ in run.steps():
            pass
        return run.adapter()


class SingleImageRun:
    """One run.  Make it with `single_image_run`, which cleans up; `update` counts the finished updates of `updates`.

    By itself it is what a run needs of its pictures and captions; `adapt` alters the model.
    """

    def __init__(
        self,
        model: StableDiffusion,
        pixels: Tensor,
        caption: Captions,
        recipe: SingleImageConfig,
        masks: Tensor | None,
        examples: Sequence[ClassImage],
        accelerator: Accelerator | None,
    ) -> None:
        self._begin(model, recipe, accelerator)
        self.updates = self.share.updates(recipe.max_train_samples)
        self.size = (pixels.shape[-2], pixels.shape[-1])
        told = [caption] * len(pixels) if isinstance(caption, str) else list(caption)
        if len(told) != len(pixels):
            raise ValueError(f"{len(pixels)} pictures need one caption or as many, got {len(told)}")
        self.captions, self.caption = tuple(dict.fromkeys(told)), told[0]
        self.class_captions = tuple(dict.fromkeys(example.caption for example in examples))
        rows = [self.captions.index(text) for text in told]
        self.picture = replace(self._pictures(pixels, masks, rows), prior=self._prior(examples, masks is not None))
        self.data_sha256 = digest(pixels, masks, *(part for example in examples for part in example.parts()))
        self.texts = (*self.captions, *self.class_captions)
        with torch.no_grad():
            self.told = model.prompts(self.texts, self.size)

    def _begin(self, model: StableDiffusion, recipe: Any, accelerator: Accelerator | None) -> None:
        """What every kind of run has: model, recipe, accelerator, and this process's share of the samples."""
        self.model, self.recipe, self.update = model, recipe, 0
        self.base = model.about()  # as it is now: a run may train the base's own weights
        self.accelerator = accelerator or Accelerator(
            cpu=model.device.type == "cpu", gradient_accumulation_steps=recipe.gradient_accumulation_steps
        )
        if self.accelerator.gradient_accumulation_steps != recipe.gradient_accumulation_steps:
            raise ValueError(
                f"the accelerator accumulates {self.accelerator.gradient_accumulation_steps} batches, "
                f"the recipe {recipe.gradient_accumulation_steps}: make the accelerator with the recipe's number"
            )
        set_autocast(self.accelerator, model.dtype == torch.bfloat16 and "quantisation" not in self.base)
        self.share = SampleShard(
            recipe.train_batch_size, recipe.gradient_accumulation_steps,
            self.accelerator.process_index, self.accelerator.num_processes,
        )  # fmt: skip

    def _pictures(self, pixels: Tensor, masks: Tensor | None, rows: Sequence[int]) -> LatentDataset:
        """Encoded pictures with their captions' rows, and what `masks` make of the loss."""
        model, recipe = self.model, self.recipe
        posteriors = [model.posterior(row[None]) for row in pixels]  # one at a time, for the sake of memory
        mean, std = (torch.cat(parts) for parts in zip(*posteriors, strict=True))
        weights = None
        if masks is not None:
            cells = adaptive_avg_pool2d(masks.to(mean), (mean.shape[-2], mean.shape[-1]))
            weights = 1 - recipe.mask_weight * (1 - cells)
            if not bool(weights.flatten(1).any(1).all()):
                raise UserError("a mask is black wherever its picture is used: paint white where the subject is")
        steps = len(model.alphas_cumprod)
        return LatentDataset(mean, std, recipe.seed, recipe.resample_latents, steps, tuple(rows), weights)

    def _prior(self, examples: Sequence[ClassImage], masked: bool) -> LatentDataset | None:
        """Encoded class pictures, their captions' rows behind those of the subject's."""
        if not examples:
            return None
        rows = [len(self.captions) + self.class_captions.index(example.caption) for example in examples]
        prior = self._pictures(class_pixels(examples, self.size), None, rows)
        weights = torch.ones_like(prior.mean[:, :1]) if masked else None
        return replace(prior, purpose="class ", resample=True, weights=weights)

    def adapt(self) -> None:
        """Put a fresh adapter into the model, and make the objective and its optimiser."""
        model, recipe, told, own = self.model, self.recipe, self.told, len(self.captions)
        names = module_names(model.unet, model.family, recipe.targets)
        add_lora(model.unet, names, recipe.rank, recipe.alpha, recipe.seed)
        if recipe.train_text_encoder:
            add_text_lora(model, recipe.rank, recipe.alpha, recipe.seed, recipe.targets)
        self.objective = SingleImageObjective(
            model, told[:own], standalone=recipe.source_embedding_frozen, snr_gamma=recipe.snr_gamma,
            prior=told[own:] if self.class_captions else None, prior_loss_weight=recipe.prior_loss_weight,
            texts=self.texts if recipe.train_text_encoder else (), size=self.size,
        )  # fmt: skip
        groups = self.objective.groups(recipe.learning_rate, recipe.text_embedding_lr, recipe.text_encoder_lr)
        self._optimise(groups)

    def _optimise(self, groups: list[dict[str, Any]]) -> None:
        optimizer = adamw(groups, self.model.device, use_8bit=self.recipe.use_8bit_adam)
        self._prepared, self.optimizer = self.accelerator.prepare(self.objective, optimizer)

    def steps(self) -> Iterator[StepReport]:
        """Make the updates that are still to be made, yielding a report after each.

        Raises:
            NonFiniteError: a loss or gradient is no number; the adapter is that of the last finished update.
        """
        recipe, first = self.recipe, self.update
        stop = None if recipe.early_stop_loss is None else EarlyStop(recipe.early_stop_loss, self.share.samples)
        batches = self.picture.batches(self.share, first, self.updates)
        if recipe.cuda_graph:
            reports = replay(self, batches)
        else:
            reports = training_steps(
                self._prepared, batches, self.optimizer, accelerator=self.accelerator,
                max_grad_norm=recipe.max_grad_norm, first_update=first, early_stop=stop,
            )  # fmt: skip
        for report in reports:
            self.update = report.update
            yield report
        if first < self.update and not self._moved():
            warnings.warn(
                f"no adapter weight moved in {self.update} updates: raise learning_rate ({recipe.learning_rate})",
                stacklevel=2,
            )

    def _moved(self) -> bool:
        """Has any B left zero?"""
        return any(bool(p.detach().any()) for p in self.objective.adapter_parameters()[1::2])

    def adapter(self, **info: Any) -> Adapter:
        """What has been learned so far; `info` is added to what the adapter records of its making.

        A standalone one carries no source embedding: it is what the text encoder says of the caption.
        """
        told = self.objective.source()
        learned = {"embeds": told.embeds, "pooled": told.pooled}
        source = {name: p.detach().to("cpu", copy=True) for name, p in learned.items() if p is not None}
        return Adapter(
            lora=self._lora(),
            rank=self.recipe.rank,
            alpha=self.recipe.alpha,
            source=None if self.recipe.without_source_embedding else source,
            info={**self.about(), "updates": self.update, "versions": versions(), **info},
        )

    @contextmanager
    def showing(self) -> Iterator[Adapter]:
        """Run the body with the adapter taken out of the model, and given as it is now; then it is back."""
        adapter = self.adapter()
        with lora_aside(self.model.unet, *self.model.text_encoders):
            yield adapter

    def _lora(self) -> dict[str, Tensor]:
        return lora_state(self.model.unet) | text_lora_state(self.model)

    def about(self) -> dict[str, Any]:
        """What decides the outcome of this run, as plain values."""
        return {
            "base": self.base,
            "caption": self.caption,
            **self._own(),
            "size": list(self.size),
            "seed": self.recipe.seed,
            "processes": self.share.processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "data_sha256": self.data_sha256,
            "config": asdict(self.recipe),
        }

    def _own(self) -> dict[str, Any]:
        """What only this kind of run has to say of itself."""
        several = {"captions": list(self.captions)} if len(self.captions) > 1 else {}
        return {**several, "targets": self.recipe.targets, "standalone": self.recipe.without_source_embedding}

    def save_checkpoint(self, output_dir: str | Path, limit: int | None = None) -> Path:
        """Write `output_dir/checkpoint-N` (on the main process), with an adapter file other programs can load."""
        folder = Path(output_dir) / f"checkpoint-{self.update}"
        if self.accelerator.is_main_process:
            trainable = {name: p.detach() for name, p in self.objective.trainable().items()}
            scaler = {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
            checkpoint = Checkpoint(self.update, trainable, self.optimizer.state_dict(), self._same_run(), scaler)
            checkpoints.save(output_dir, checkpoint, limit=limit, extra=self.loadable())
        self.accelerator.wait_for_everyone()
        return folder

    def loadable(self) -> dict[str, bytes]:
        """What a checkpoint holds besides its state: the adapter as other programs load it."""
        return {"pytorch_lora_weights.safetensors": diffusers_file(self._lora(), self.recipe.alpha)}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from `checkpoint`; UserError if it comes from a run with other settings or another picture."""
        checkpoints.check_same_run(checkpoint, self._same_run())
        checkpoints.restore(checkpoint, self.objective.trainable(), self.optimizer)
        if self.accelerator.scaler is not None and checkpoint.scaler:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)
        self.update = checkpoint.update

    def _same_run(self) -> dict[str, Any]:
        about = self.about()
        config = about.pop("config")
        return about | {name: value for name, value in config.items() if name not in MAY_DIFFER}


def versions() -> dict[str, str]:
    """Of this package and of the libraries that decide the numbers."""
    own = {"python": platform.python_version(), "personalize": __version__}
    return own | {name: version(name) for name in PACKAGES}
