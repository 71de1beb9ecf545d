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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from personalize import __version__, checkpoints
from personalize.adapter import Adapter
from personalize.checkpoints import Checkpoint
from personalize.data import Picture, Share
from personalize.errors import UserError
from personalize.formats import diffusers_file
from personalize.lora import add_lora, lora_state, module_names, remove_lora
from personalize.model import StableDiffusion
from personalize.objectives import SingleImage
from personalize.training import EarlyStop, StepReport, fit

MAY_DIFFER = ("max_train_samples", "max_train_steps")  # between a run and its resumption
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Recipe:
    """How a picture is learned.  The names are the trainer's options; the defaults are those of the method.

    An update uses `train_batch_size` samples, times `gradient_accumulation_steps`, times the number of processes;
    `max_train_samples` counts over all of them, so the defaults make 400 // 10 = 40 updates.
    """

    rank: int = 16
    lora_alpha: float | None = None  # None: the rank, so that alpha / rank = 1
    targets: str = "full"
    learning_rate: float = 1e-3
    text_embedding_lr: float = 1e-3
    standalone: bool = False
    max_train_samples: int = 400
    train_batch_size: int = 10
    gradient_accumulation_steps: int = 1
    resample_latents: bool = False
    snr_gamma: float | None = None
    max_grad_norm: float | None = None
    early_stop_loss: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        positive = {"rank", "max_train_samples", "train_batch_size", "gradient_accumulation_steps", "lora_alpha",
                    "learning_rate", "snr_gamma", "max_grad_norm", "early_stop_loss"}  # fmt: skip
        for name, value in asdict(self).items():
            if name in positive and value is not None and not value > 0:
                raise UserError(f"{name} must be above 0, got {value}")
        if not self.text_embedding_lr >= 0:
            raise UserError(f"text_embedding_lr must be 0 or more, got {self.text_embedding_lr}")

    @property
    def alpha(self) -> float:
        return float(self.rank if self.lora_alpha is None else self.lora_alpha)

    @property
    def frozen_text(self) -> bool:
        """Is the source embedding left at the caption's encoding?"""
        return self.standalone or self.text_embedding_lr == 0


@contextmanager
def learning(
    model: StableDiffusion,
    pixels: Tensor,
    caption: str,
    recipe: Recipe | None = None,
    *,
    accelerator: Accelerator | None = None,
) -> Iterator[Learning]:
    """A run that learns `pixels` (1, 3, H, W) in [−1, 1] as `caption`; on leaving, `model` is as it was.

    Raises:
        UserError: settings that cannot work, or a UNet that already carries an adapter.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.unet.parameters()]
    try:
        yield Learning(model, pixels, caption, recipe or Recipe(), accelerator)
    finally:
        remove_lora(model.unet)
        for parameter, flag in flags:
            parameter.requires_grad_(flag).grad = None


def learn(
    model: StableDiffusion,
    pixels: Tensor,
    caption: str,
    recipe: Recipe | None = None,
    *,
    accelerator: Accelerator | None = None,
) -> Adapter:
    """Learn `pixels` (1, 3, H, W) in [−1, 1] as `caption`, silently, and return the adapter; see `learning`."""
    with learning(model, pixels, caption, recipe, accelerator=accelerator) as run:
        for _ in run.steps():
            pass
        return run.adapter()


class Learning:
    """One run.  Make it with `learning`, which cleans up; `update` counts the finished updates of `updates`."""

    def __init__(
        self, model: StableDiffusion, pixels: Tensor, caption: str, recipe: Recipe, accelerator: Accelerator | None
    ) -> None:
        self.model, self.caption, self.recipe = model, caption, recipe
        self.accelerator = accelerator or Accelerator(
            cpu=model.device.type == "cpu", gradient_accumulation_steps=recipe.gradient_accumulation_steps
        )
        if self.accelerator.gradient_accumulation_steps != recipe.gradient_accumulation_steps:
            raise ValueError(
                f"the accelerator accumulates {self.accelerator.gradient_accumulation_steps} batches, "
                f"the recipe {recipe.gradient_accumulation_steps}: make the accelerator with the recipe's number"
            )
        self.share = Share(
            recipe.train_batch_size, recipe.gradient_accumulation_steps,
            self.accelerator.process_index, self.accelerator.num_processes,
        )  # fmt: skip
        self.update, self.updates = 0, self.share.updates(recipe.max_train_samples)
        self.size = (pixels.shape[-2], pixels.shape[-1])
        self.picture = Picture(
            *model.posterior(pixels), recipe.seed, recipe.resample_latents, len(model.alphas_cumprod)
        )
        self.data_sha256 = sha256(pixels.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()
        with torch.no_grad():
            source = model.prompts([caption], self.size)
        names = module_names(model.unet, model.family, recipe.targets)
        add_lora(model.unet, names, recipe.rank, recipe.alpha, recipe.seed)
        try:
            self._prepare(source)
        except BaseException:
            remove_lora(model.unet)
            raise

    def _prepare(self, source: Any) -> None:
        recipe = self.recipe
        self.objective = SingleImage(self.model, source, standalone=recipe.frozen_text, snr_gamma=recipe.snr_gamma)
        groups = self.objective.groups(recipe.learning_rate, recipe.text_embedding_lr)
        optimizer = torch.optim.Adam(groups, fused=self.model.device.type in ("cuda", "cpu"))
        self._prepared, self.optimizer = self.accelerator.prepare(self.objective, optimizer)

    def steps(self) -> Iterator[StepReport]:
        """Make the updates that are still to be made, yielding a report after each.

        Raises:
            NonFiniteError: a loss or gradient is no number; the adapter is that of the last finished update.
        """
        recipe, first = self.recipe, self.update
        stop = None
        if recipe.early_stop_loss is not None:
            stop = EarlyStop(recipe.early_stop_loss, self.share.samples)
        for report in fit(
            self._prepared,
            self.picture.batches(self.share, first, self.updates),
            self.optimizer,
            accelerator=self.accelerator,
            max_grad_norm=recipe.max_grad_norm,
            first_update=first,
            early_stop=stop,
        ):
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
        learned = {"embeds": self.objective.embeds, "pooled": self.objective.pooled}
        source = {name: p.detach().to("cpu", copy=True) for name, p in learned.items() if p is not None}
        return Adapter(
            lora=lora_state(self.model.unet),
            rank=self.recipe.rank,
            alpha=self.recipe.alpha,
            source=None if self.recipe.frozen_text else source,
            info={**self.about(), "updates": self.update, "versions": versions(), **info},
        )

    def about(self) -> dict[str, Any]:
        """What decides the outcome of this run, as plain values."""
        return {
            "base": {**self.model.identity, "prediction_type": self.model.prediction_type},
            "caption": self.caption,
            "targets": self.recipe.targets,
            "size": list(self.size),
            "seed": self.recipe.seed,
            "standalone": self.recipe.frozen_text,
            "processes": self.share.processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "data_sha256": self.data_sha256,
            "config": asdict(self.recipe),
        }

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
        return {"pytorch_lora_weights.safetensors": diffusers_file(lora_state(self.model.unet), self.recipe.alpha)}

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
