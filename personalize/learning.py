"""Train an adapter on one picture of a subject, or on a few.

    with single_image_run(model, pixels, "a photo of a dog", SingleImageConfig(rank=8)) as run:
        for report in run.steps():
            print(report.update, float(report.losses["loss"]))
        adapter = run.adapter()

`learn` does the same in one call.  The trainer, the quick start and the editor all train through this module.
"""

from __future__ import annotations

import platform
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from personalize import checkpoints
from personalize.adapter import Adapter
from personalize.captured import graphed_steps
from personalize.checkpoints import Checkpoint
from personalize.concept_data import ClassImage, class_pixels, content_hash
from personalize.data import Dataset, LatentDataset, SampleShard
from personalize.errors import UserError
from personalize.formats import diffusers_file
from personalize.lean import compiled_blocks, fast_paths, in_precision
from personalize.lora import add_lora, lora_removed, lora_state, module_names
from personalize.losses import Objective
from personalize.model import Conditioning, StableDiffusion
from personalize.objectives import SingleImageObjective
from personalize.recipes import MultiConceptConfig, SingleImageConfig
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

# settings that may change between a run and its resumption: the samples of an update and their loss stay the same
MAY_DIFFER = ("max_train_samples", "max_train_steps", "gradient_checkpointing", "cuda_graph", "torch_compile")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")
ConfigT = TypeVar("ConfigT", SingleImageConfig, MultiConceptConfig)
ObjectiveT = TypeVar("ObjectiveT", bound=Objective)


class TrainingRun(ABC, Generic[ConfigT, ObjectiveT]):
    """One training run on a loaded base model: what single-image and multi-concept runs share.

    A subclass sets the attributes below, adds the adapter to the model and calls `prepare`.  After that `steps` makes
    the updates, `adapter` returns what has been learned, `save_checkpoint` and `resume` interrupt and continue the run.

    Attributes:
        update, updates: number of updates that are finished, and of those the whole run makes.
        shard: which samples of an update this process draws.
        dataset: where the batches come from.
        caption: what the (first) picture shows; recorded in the adapter.
        size: height and width of the training pictures, in pixels.
        data_sha256: hash of all training data; a run resumes only on the same data.
        objective: the module that owns every trained parameter, and whose forward pass is the loss.
    """

    updates: int
    caption: str
    size: tuple[int, int]
    dataset: Dataset
    data_sha256: str
    objective: ObjectiveT

    def __init__(self, model: StableDiffusion, config: ConfigT, accelerator: Accelerator | None) -> None:
        self.model, self.config, self.update = model, config, 0
        self.base = model.about()  # read before anything is trained: a run may train the base's own weights
        self.accelerator = accelerator or Accelerator(
            cpu=model.device.type == "cpu", gradient_accumulation_steps=config.gradient_accumulation_steps
        )
        if self.accelerator.gradient_accumulation_steps != config.gradient_accumulation_steps:
            raise ValueError(
                f"the accelerator accumulates {self.accelerator.gradient_accumulation_steps} batches, the configuration"
                f" {config.gradient_accumulation_steps}: make the accelerator with the configuration's number"
            )
        bf16_weights = model.dtype == torch.bfloat16 and "quantisation" not in self.base
        set_autocast(self.accelerator, enabled=not bf16_weights)
        self.shard = SampleShard(
            config.train_batch_size, config.gradient_accumulation_steps,
            self.accelerator.process_index, self.accelerator.num_processes,
        )  # fmt: skip

    def prepare(self, objective: ObjectiveT, groups: list[dict[str, Any]]) -> None:
        """Train `objective` with AdamW over the parameter `groups`; Accelerate prepares both."""
        self.objective = objective
        optimizer = adamw(groups, self.model.device, use_8bit=self.config.use_8bit_adam)
        self._prepared, self.optimizer = self.accelerator.prepare(objective, optimizer)

    def steps(self) -> Iterator[StepReport]:
        """Make the updates that remain, yielding a report after each.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite; the adapter is that of the last finished update.
        """
        first = self.update
        for report in self._reports(self.dataset.batches(self.shard, first, self.updates)):
            self.update = report.update
            yield report
        if first < self.update and not self._any_weight_changed():
            rate = self.config.learning_rate
            warnings.warn(
                f"no adapter weight changed in {self.update} updates: raise learning_rate ({rate})", stacklevel=2
            )

    def _reports(self, batches: Iterable[dict[str, Any]]) -> Iterator[StepReport]:
        config, accelerator = self.config, self.accelerator
        if config.cuda_graph:
            autocast = accelerator.mixed_precision == "fp16" or "quantisation" in self.base
            return graphed_steps(
                self.objective, batches, self.optimizer.optimizer, config, device=self.model.device, shard=self.shard,
                autocast=autocast, first_update=self.update,
            )  # fmt: skip
        stop = None if config.early_stop_loss is None else EarlyStop(config.early_stop_loss, self.shard.samples)
        return training_steps(
            self._prepared, batches, self.optimizer, accelerator=accelerator, max_grad_norm=config.max_grad_norm,
            first_update=self.update, early_stop=stop,
        )  # fmt: skip

    def _any_weight_changed(self) -> bool:
        """Has any update had an effect?  B is zero before the first one."""
        return any(bool(b.detach().any()) for b in self.objective.adapter_parameters()[1::2])

    @abstractmethod
    def adapter(self, **info: Any) -> Adapter:
        """What has been learned so far; `info` is added to the adapter's metadata."""

    @abstractmethod
    def lora(self) -> dict[str, Tensor]:
        """Copies of the adapter's LoRA tensors, by the names they have in adapter files."""

    @contextmanager
    def adapter_removed(self) -> Iterator[Adapter]:
        """Yield the adapter as it is now, and run the body on the bare base model; then training can go on."""
        adapter = self.adapter()
        with lora_removed(self.model.unet, *self.model.text_encoders):
            yield adapter

    def metadata(self) -> dict[str, Any]:
        """All settings and data that decide the outcome of this run, as values that JSON can hold."""
        return {
            "base": self.base,
            "caption": self.caption,
            **self._own_metadata(),
            "size": list(self.size),
            "seed": self.config.seed,
            "processes": self.shard.processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "data_sha256": self.data_sha256,
            "config": asdict(self.config),
        }

    @abstractmethod
    def _own_metadata(self) -> dict[str, Any]:
        """The entries of `metadata` that only this kind of run has."""

    def save_checkpoint(self, output_dir: str | Path, limit: int | None = None) -> Path:
        """Write `output_dir/checkpoint-N` on the main process, with an adapter file that other programs can load."""
        folder = Path(output_dir) / f"checkpoint-{self.update}"
        if self.accelerator.is_main_process:
            trainable = {name: p.detach() for name, p in self.objective.trainable().items()}
            scaler = {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
            state = self.optimizer.state_dict()
            checkpoint = Checkpoint(self.update, trainable, state, self._resumable_metadata(), scaler)
            checkpoints.save(output_dir, checkpoint, limit=limit, extra=self.adapter_files())
        self.accelerator.wait_for_everyone()
        return folder

    def adapter_files(self) -> dict[str, bytes]:
        """The adapter as other programs load it, by file name; a checkpoint holds it beside the training state."""
        return {"pytorch_lora_weights.safetensors": diffusers_file(self.lora(), self.config.alpha)}

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`; UserError if it was made with other settings or another picture."""
        checkpoints.check_same_run(checkpoint, self._resumable_metadata())
        checkpoints.restore(checkpoint, self.objective.trainable(), self.optimizer)
        if self.accelerator.scaler is not None and checkpoint.scaler:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)
        self.update = checkpoint.update

    def _resumable_metadata(self) -> dict[str, Any]:
        """`metadata`, flat and without the settings that a resumed run may change: equal for the same run only."""
        metadata = self.metadata()
        config = metadata.pop("config")
        return metadata | {name: value for name, value in config.items() if name not in MAY_DIFFER}


def versions() -> dict[str, str]:
    """The versions of Python, of this package, and of the libraries that decide the numbers."""
    names = ("personalize", *PACKAGES)
    return {"python": platform.python_version()} | {name: _installed_version(name) for name in names}


def _installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # e.g. `personalize` run from a checkout
        return "not installed"


Captions = str | Sequence[str]  # one for all pictures, or one for each


@contextmanager
def single_image_run(
    model: StableDiffusion,
    pixels: Tensor,
    caption: Captions,
    config: SingleImageConfig | None = None,
    *,
    masks: Tensor | None = None,
    class_images: Sequence[ClassImage] = (),
    accelerator: Accelerator | None = None,
) -> Iterator[SingleImageRun]:
    """Prepare a run that trains an adapter on `pixels` (p, 3, H, W) in [−1, 1] with their `caption`.

    On leaving the context, `model` is as it was before.

    Args:
        masks: (p, 1, H, W) in [0, 1], 1 where the subject is; see `SingleImageConfig.mask_weight`.
        class_images: class pictures with captions, for prior preservation; cut to H×W.

    Raises:
        UserError: settings that cannot work, or a model that already carries an adapter.
    """
    config = config or SingleImageConfig()
    with (
        restored(model), in_precision(model.unet, training_dtype(model, accelerator)),
        compiled_blocks(model.unet, config.torch_compile), fast_paths(model.unet),
        gradient_checkpointing(model.unet, config.gradient_checkpointing),
    ):  # fmt: skip
        run = SingleImageRun(model, pixels, caption, config, masks, class_images, accelerator)
        run.add_adapter()
        yield run


def learn(
    model: StableDiffusion,
    pixels: Tensor,
    caption: Captions,
    config: SingleImageConfig | None = None,
    *,
    accelerator: Accelerator | None = None,
) -> Adapter:
    """Train on `pixels` (p, 3, H, W) in [−1, 1] with their `caption` and return the adapter; see `single_image_run`."""
    with single_image_run(model, pixels, caption, config, accelerator=accelerator) as run:
        for _ in run.steps():
            pass
        return run.adapter()


class SingleImageRun(TrainingRun[SingleImageConfig, SingleImageObjective]):
    """A run that trains on one picture or a few; make it with `single_image_run`, which restores the model afterwards.

    Making one encodes the pictures and captions and leaves the model alone; `add_adapter` alters it.

    Attributes:
        captions: the different captions of the pictures, (p); the source embedding has a row for each.
        class_captions: the different captions of the class pictures.
        conditioning: the text encoders' output for all of these, in this order.
    """

    def __init__(
        self,
        model: StableDiffusion,
        pixels: Tensor,
        caption: Captions,
        config: SingleImageConfig,
        masks: Tensor | None,
        class_images: Sequence[ClassImage],
        accelerator: Accelerator | None,
    ) -> None:
        super().__init__(model, config, accelerator)
        self.updates = self.shard.updates(config.max_train_samples)
        self.size = (pixels.shape[-2], pixels.shape[-1])
        captions = [caption] * len(pixels) if isinstance(caption, str) else list(caption)
        if len(captions) != len(pixels):
            raise ValueError(f"{len(pixels)} pictures need one caption or as many, got {len(captions)}")
        self.captions, self.caption = tuple(dict.fromkeys(captions)), captions[0]
        self.class_captions = tuple(dict.fromkeys(image.caption for image in class_images))
        rows = [self.captions.index(text) for text in captions]
        dataset, prior = self._encoded(pixels, masks, rows), self._encoded_class_images(class_images, masks is not None)
        self.dataset = replace(dataset, prior=prior)
        self.data_sha256 = content_hash(pixels, masks, *(part for image in class_images for part in image.content()))
        self.texts = (*self.captions, *self.class_captions)
        with torch.no_grad():
            self.conditioning = model.prompts(self.texts, self.size)

    def _encoded(self, pixels: Tensor, masks: Tensor | None, rows: Sequence[int]) -> LatentDataset:
        """The pictures encoded, with the rows of their captions, and loss weights made from `masks`."""
        model, config = self.model, self.config
        with fast_paths(model.vae.encoder):
            posteriors = [model.posterior(row[None]) for row in pixels]  # one at a time, to save memory
        mean, std = (torch.cat(parts) for parts in zip(*posteriors, strict=True))
        weights = None
        if masks is not None:
            cells = adaptive_avg_pool2d(masks.to(mean), (mean.shape[-2], mean.shape[-1]))
            weights = 1 - config.mask_weight * (1 - cells)
            if not bool(weights.flatten(1).any(1).all()):
                raise UserError("a mask is black wherever its picture is used: paint white where the subject is")
        steps = len(model.alphas_cumprod)
        return LatentDataset(mean, std, config.seed, config.resample_latents, steps, tuple(rows), weights)

    def _encoded_class_images(self, class_images: Sequence[ClassImage], masked: bool) -> LatentDataset | None:
        """The class pictures encoded; their captions' rows come after those of the subject's captions."""
        if not class_images:
            return None
        rows = [len(self.captions) + self.class_captions.index(image.caption) for image in class_images]
        prior = self._encoded(class_pixels(class_images, self.size), None, rows)
        weights = torch.ones_like(prior.mean[:, :1]) if masked else None
        return replace(prior, purpose="class ", resample=True, weights=weights)

    def add_adapter(self) -> None:
        """Add a new adapter to the model, and make the objective and its optimizer."""
        model, config, conditioning, own = self.model, self.config, self.conditioning, len(self.captions)
        names = module_names(model.unet, model.family, config.targets)
        add_lora(model.unet, names, config.rank, config.alpha, config.seed)
        if config.train_text_encoder:
            add_text_lora(model, config.rank, config.alpha, config.seed, config.targets)
        objective = SingleImageObjective(
            model, conditioning[:own], standalone=config.source_embedding_frozen, snr_gamma=config.snr_gamma,
            prior=conditioning[own:] if self.class_captions else None, prior_loss_weight=config.prior_loss_weight,
            texts=self.texts if config.train_text_encoder else (), size=self.size,
        )  # fmt: skip
        rates = config.learning_rate, config.text_embedding_lr, config.text_encoder_lr
        self.prepare(objective, objective.groups(*rates))

    def adapter(self, **info: Any) -> Adapter:
        """What has been learned so far; `info` is added to the adapter's metadata."""
        return self.make_adapter(self.lora(), self.objective.source(), self.update, **info)

    def make_adapter(self, lora: dict[str, Tensor], source: Conditioning, updates: int, **info: Any) -> Adapter:
        """An adapter of these LoRA tensors and this source embedding (one row), with the run's metadata.

        With `standalone` it has no source embedding: there it is the text encoder's output for the caption.
        """
        parts = {"embeds": source.embeds, "pooled": source.pooled}
        embedding = {name: part.detach().to("cpu", copy=True) for name, part in parts.items() if part is not None}
        return Adapter(
            lora=lora,
            rank=self.config.rank,
            alpha=self.config.alpha,
            source=None if self.config.without_source_embedding else embedding,
            info={**self.metadata(), "updates": updates, "versions": versions(), **info},
        )

    def lora(self) -> dict[str, Tensor]:
        return lora_state(self.model.unet) | text_lora_state(self.model)

    def _own_metadata(self) -> dict[str, Any]:
        captions = {"captions": list(self.captions)} if len(self.captions) > 1 else {}
        return {**captions, "targets": self.config.targets, "standalone": self.config.without_source_embedding}
