"""What every training run shares: the accelerator, the optimizer, its updates, checkpoints, and the adapter so far."""

from __future__ import annotations

import platform
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.lora import changes_nothing, lora_removed
from personalize.errors import Notice, UserError
from personalize.formats import timestep_rank
from personalize.formats.timestep_rank import TimestepRank
from personalize.io.progress import ticked
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training import checkpoints
from personalize.training.averaging import WeightAverage
from personalize.training.best_weights import PREFIX, BestWeights
from personalize.training.checkpoints import Checkpoint
from personalize.training.config import MultiConceptConfig, SingleImageConfig
from personalize.training.cuda_graph import graphed_steps
from personalize.training.data.samples import Dataset, SampleShard
from personalize.training.loop import EarlyStop, StepReport, adamw, make_lr_scheduler, set_autocast, training_steps
from personalize.training.losses import Objective
from personalize.training.own_accelerator import default_accelerator

# settings that may change between a run and its resumption: the samples of an update and their loss stay the same
MAY_DIFFER = (
    "max_train_samples", "min_train_samples", "samples_per_picture", "max_train_steps", "train_batch_size",
    "gradient_accumulation_steps", "gradient_checkpointing", "cuda_graph", "torch_compile", "offload",
)  # fmt: skip
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
        self.accelerator = accelerator or default_accelerator(model.device)
        if self.accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                f"the accelerator accumulates {self.accelerator.gradient_accumulation_steps} batches: make it without "
                "gradient_accumulation_steps, for the run adds up the batches of an update itself"
            )
        bf16_weights = model.dtype == torch.bfloat16 and "quantisation" not in self.base
        set_autocast(self.accelerator, enabled=not bf16_weights)
        self.shard = SampleShard.of(config, self.accelerator.process_index, self.accelerator.num_processes)

    def prepare(self, objective: ObjectiveT, groups: list[dict[str, Any]]) -> None:
        """Train `objective` with AdamW over the parameter `groups`; Accelerate prepares both."""
        self.objective = objective
        optimizer = adamw(groups, self.model.device, use_8bit=self.config.use_8bit_adam)
        self.lr_scheduler = make_lr_scheduler(self.config, optimizer, self.updates)
        placed = [False, False]  # both are where the model is, which stays there
        self._prepared, self.optimizer = self.accelerator.prepare(objective, optimizer, device_placement=placed)
        trained, decay = objective.trainable(), self.config.ema_max_decay
        self.average = WeightAverage(trained, decay) if self.config.use_ema else None
        self.best: BestWeights | None = None

    def keep_best(self, about: Mapping[str, Any]) -> None:
        """From now on keep the weights with the best score; `about` says what is scored, and how."""
        self.best = BestWeights(self.objective.trainable(), about)

    def steps(self) -> Iterator[StepReport]:
        """Make the updates that remain, yielding a report after each.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite; the adapter is that of the last finished update.
        """
        first = self.update
        reports = self._reports(self.dataset.updates(self.shard, first, self.updates))
        for report in ticked(reports, "Learning", total=self.updates, done=first, note=StepReport.note):
            self.update = report.update
            if self.average is not None:
                report.values()  # raises before an update that changed nothing is averaged
                self.average.update(self.update)
            yield report
        if first < self.update and not self._any_weight_changed():
            rate = self.lr_scheduler.base_lrs[0]  # the adapter's
            warnings.warn(
                f"no adapter weight changed in {self.update} updates: raise learning_rate ({rate})", stacklevel=2
            )

    def _reports(self, updates: Iterable[list[dict[str, Any]]]) -> Iterator[StepReport]:
        config, accelerator = self.config, self.accelerator
        if config.cuda_graph:
            autocast = accelerator.mixed_precision == "fp16" or "quantisation" in self.base
            return graphed_steps(
                self.objective, chain.from_iterable(updates), self.optimizer.optimizer, config,
                device=self.model.device, shard=self.shard, autocast=autocast, first_update=self.update,
            )  # fmt: skip
        stop = None if config.early_stop_loss is None else EarlyStop(config.early_stop_loss, self.shard.samples)
        return training_steps(
            self._prepared, updates, self.optimizer, accelerator=accelerator, max_grad_norm=config.max_grad_norm,
            lr_scheduler=self.lr_scheduler, first_update=self.update, early_stop=stop,
        )  # fmt: skip

    def _any_weight_changed(self) -> bool:
        """Has any update had an effect?"""
        return not changes_nothing(self.model.unet)

    def timestep_rank(self) -> TimestepRank | None:
        """The rule by which LoRA components take part at high noise; None if all always do."""
        config = self.config
        if config.min_rank is None:
            return None
        return TimestepRank(config.rank, config.min_rank, config.alpha_rank_scale, len(self.model.alphas_cumprod))

    def averaged(self) -> AbstractContextManager[None]:
        """A context in which the trained tensors are what is saved: with use_ema their averages."""
        return nullcontext() if self.average is None else self.average.in_place()

    def adapter(self, **info: Any) -> Adapter:
        """What has been learned so far; `info` is added to the adapter's metadata."""
        with self.averaged():
            return self._adapter(**info)

    def kept_adapter(self, **info: Any) -> Adapter:
        """What a finished run saves: the weights with the best score if there are scores, or else the last."""
        with self.kept():
            adapter = self._adapter(**info)
        if self.best is None:
            return adapter
        if self.best.update:
            return replace(adapter, info={**adapter.info, **self.best.info(self.update)})
        if self.accelerator.is_main_process:  # the others draw no pictures
            warnings.warn("no pictures could be scored: the last weights are saved, not the best", stacklevel=2)
        return adapter

    def kept(self) -> AbstractContextManager[None]:
        """A context in which the trained tensors are those of `kept_adapter`."""
        return self.best.in_place() if self.best is not None and self.best.update else self.averaged()

    @abstractmethod
    def _adapter(self, **info: Any) -> Adapter:
        """The adapter of the trained tensors as they are in the model."""

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
            **({} if (rule := self.timestep_rank()) is None else {timestep_rank.KEY: rule.values()}),
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

    def save_checkpoint(self, output_dir: str | Path, limit: int | None = None, *, wait: bool = True) -> Path:
        """Write `output_dir/checkpoint-N` on the main process, which is an adapter folder too.

        The other processes `wait` for that, also if it fails.
        """
        try:
            return self._save_checkpoint(output_dir, limit)
        finally:
            if wait:
                self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, output_dir: str | Path, limit: int | None) -> Path:
        folder = Path(output_dir) / f"checkpoint-{self.update}"
        if self.accelerator.is_main_process:
            best = {} if self.best is None else self.best.state()
            trainable = {name: tensor.detach() for name, tensor in (self._resumable() | best).items()}
            scaler = {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
            state = self.optimizer.state_dict()
            files = self.adapter().folder_files(folder.name, {}, torch.float32)
            checkpoint = Checkpoint(self.update, trainable, state, self.resumable_metadata(), scaler)
            return checkpoints.save(output_dir, checkpoint, limit=limit, extra=files)
        return folder

    def _resumable(self) -> dict[str, Tensor]:
        return {**self.objective.resumable(), **({} if self.average is None else self.average.state())}

    def _resume_best(self, state: dict[str, Tensor]) -> None:
        if self.best is not None and not self.best.load(state):
            text = "the checkpoint has no scores that compare with those of this run: the best is sought from here on"
            warnings.warn(text, Notice, stacklevel=3)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from `checkpoint`; UserError if it was made with other settings or another picture."""
        checkpoints.check_same_run(checkpoint, self.resumable_metadata())
        if checkpoint.update > self.updates:
            raise UserError(
                f"the checkpoint has {checkpoint.update} updates, and this run makes {self.updates}: make more"
            )
        best = {name: tensor for name, tensor in checkpoint.trainable.items() if name.startswith(PREFIX)}
        own = {name: tensor for name, tensor in checkpoint.trainable.items() if name not in best}
        checkpoints.restore(replace(checkpoint, trainable=own), self._resumable(), self.optimizer)
        self._resume_best(best)
        if self.accelerator.scaler is not None and checkpoint.scaler:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)
        self.update = self.lr_scheduler.last_epoch = checkpoint.update
        schedule = zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True)
        for group, (rate, factor) in zip(self.optimizer.param_groups, schedule, strict=True):
            group["lr"] = rate * factor(self.update)

    def resumable_metadata(self) -> dict[str, Any]:
        """`metadata`, flat and without the settings that a resumed run may change: equal for the same run only."""
        metadata = self.metadata()
        config = metadata.pop("config")
        del metadata["processes"]  # each update has the same samples, however many share them
        config["samples_per_update"] = self.shard.samples  # however their number was given
        if config["lr_scheduler"] != "constant":  # then the number of updates decides the rate of each
            metadata["updates"] = self.updates
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
