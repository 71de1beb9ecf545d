"""What every trainer does around its run: load the base, show progress, log, save checkpoints, validate, upload."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from personalize.adapters import hub
from personalize.adapters.adapter_files import check_target
from personalize.errors import Notice, Stopped, UserError, said_if_stopped
from personalize.io.locks import folder_lock
from personalize.models.loading import require_bf16
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training import checkpoints
from personalize.training.best_weights import Judge
from personalize.training.cuda_graph import check_capturable
from personalize.training.data.samples import SampleShard
from personalize.training.distributed import accelerator_of
from personalize.training.loop import StepReport
from personalize.training.memory_advice import check_fits
from personalize.training.memory_estimate import estimate
from personalize.training.run import TrainingRun
from personalize.training.saving import check_space_for
from personalize.training.stopping import PATIENCE, StopRequest, stop_requests
from personalize.training.validation import validate

Watcher = Callable[[TrainingRun, StepReport], bool]  # called after an update; True ends the training there
TRACKERS = ("tensorboard", "wandb", "comet_ml", "trackio")


def make_accelerator(config: Any) -> Accelerator:
    """The Accelerator of a trainer's options, made after a check that everything they name is available.

    Its `mixed_precision` is that of the options, or if they give none, that of `accelerate launch`.

    Raises:
        UserError: a tracker that is not installed, a launcher that divides the model, a precision that the device does
            not support, a checkpoint or a hub repository that does not exist or cannot be used.
    """
    check_tracker(config.report_to)
    accelerator = accelerator_of(
        config.mixed_precision,
        log_with=config.report_to,
        project_dir=str(config.output_dir / config.logging_dir),
    )
    checkpoints.find_together(config.output_dir, config.resume_from_checkpoint, accelerator)
    _check_precision(accelerator)
    SampleShard.of(config, accelerator.process_index, accelerator.num_processes)  # raises if the layout cannot work
    if config.cuda_graph:
        autocast = accelerator.mixed_precision == "fp16" or config.load_in_4bit
        check_capturable(config, accelerator.device, accelerator.num_processes, autocast=autocast)
    if config.push_to_hub and accelerator.is_main_process:
        hub.repository(repository(config), private=config.person)
    return accelerator


def _check_precision(accelerator: Accelerator) -> None:
    """UserError for a precision that the device does not support: fp16 on a CPU would have no loss scaler."""
    precision, device = accelerator.mixed_precision, accelerator.device.type
    if precision != "no" and (precision == "fp8" or not accelerator.native_amp):
        raise UserError(f"--mixed_precision {precision} does not work on this {device}: use bf16 or no")
    if precision == "bf16":
        require_bf16(accelerator.device)


def check_tracker(name: str | None) -> None:
    """UserError unless the package of the tracker `name` is installed; "all" needs any one of them."""
    wanted = TRACKERS if name == "all" else () if name is None else (name,)
    if wanted and not any(map(find_spec, wanted)):
        raise UserError(f"--report_to {name} needs the package {' or '.join(wanted)}: pip install {wanted[0]}")


def repository(config: Any) -> str:
    """The repository's name on the hub: the given one, or that of the output folder."""
    return config.hub_model_id or config.output_dir.resolve().name


def load_base(config: Any, accelerator: Accelerator, *, full_weights: bool = False) -> StableDiffusion:
    """Load the base model in the precision of `accelerator`.

    bf16 and fp16 are the precision of the UNet's weights, which take half the memory, and so of every picture drawn.
    If the base's own weights are trained (`full_weights`), the UNet stays in fp32 behind autocast.  With load_in_4bit
    all that is not in 4 bits is bf16, or fp16 if asked for; the memory it saves is printed.

    Raises:
        UserError: `full_weights` together with load_in_4bit, or a precision that the device does not support.
    """
    _check_precision(accelerator)
    if full_weights and config.load_in_4bit:
        raise UserError("full_kv trains the base's own weights, which cannot be in 4 bits: leave one of them out")
    precision = "no" if full_weights else accelerator.mixed_precision
    plain = torch.bfloat16 if config.load_in_4bit else torch.float32
    model = StableDiffusion.load(
        config.pretrained_model_name_or_path, device=accelerator.device,
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, plain),
        revision=config.revision, variant=config.variant, prediction_type=config.prediction_type,
    )  # fmt: skip
    if config.load_in_4bit:
        before, after = model.quantize()
        accelerator.print(f"4 bits: the UNet takes {after / 1e6:.0f} MB, {before / 1e6:.0f} MB in 16 bits")
    return model


def train(config: Any, run: TrainingRun, name: str, watch: Watcher | None = None, judge: Judge | None = None) -> None:
    """Make all updates of `run`, with a memory estimate before, and progress, logs, validation and checkpoints.

    `watch` is called after each update.  If it returns True, training ends there with a checkpoint to go on from.
    With a `judge`, the run keeps the weights whose validation pictures score best, see `TrainingRun.kept_adapter`.
    """
    accelerator = run.accelerator
    check_same_data(run.metadata(), accelerator)
    if judge is not None:
        run.keep_best(judge.about)
    _resume(config, run)
    accelerator.print(f"{run.updates} updates. {run.shard}")
    expected = estimate(run)
    accelerator.print(expected)
    if advice := check_fits(expected, run):
        accelerator.print(f"Warning: {advice}")
    if config.report_to is not None:
        accelerator.init_trackers(name, {key: str(value) for key, value in vars(config).items()})
    if accelerator.is_main_process:
        check_space_for(config, run)
    leave_after = None if accelerator.is_main_process else PATIENCE
    if run.best is not None and run.best.judged < run.update and _due(run.update, config.validation_steps):
        validate(run, config, judge)  # the checkpoint was written before its own pictures were drawn
    with (
        stop_requests(deferred=bool(config.checkpointing_steps), leave_after=leave_after) as stop,
        _others_alive(config, run, stop),
        said_if_stopped(lambda: _unsaved_progress(config, run)),
    ):
        for report in run.steps():
            losses = report.values()
            accelerator.log(losses | {"learning_rate": report.learning_rates[0]}, step=report.update)
            _obey(stop, config, run)
            if _due(report.update, config.checkpointing_steps):
                _save_checkpoint(config, run)
            if config.validation_prompt and _due(report.update, config.validation_steps):
                validate(run, config, judge)
            if watch is not None and watch(run, report):
                run.save_checkpoint(config.output_dir, config.checkpoints_total_limit)
                break
        if run.best is not None and run.best.judged < run.update:
            validate(run, config, judge)
        _obey(stop, config, run)  # a signal during the last pictures, which are drawn after the last update


def _obey(stop: StopRequest, config: Any, run: TrainingRun) -> None:
    """Stopped, once a checkpoint is saved, if a signal has arrived; the main process decides for all."""
    if stop.signal is not None and run.accelerator.is_main_process:
        raise Stopped(stop.signal, f"stopped after {_saved_progress(config, run)}")


def _due(update: int, every: int | None) -> bool:
    """Is something that is done `every` so many updates done after this one?  Never if `every` is 0 or None."""
    return bool(every) and update % every == 0


def _save_checkpoint(config: Any, run: TrainingRun, *, wait: bool = True) -> Path | None:
    """A checkpoint of this update; None, and a Notice, if the disk does not take it: training goes on."""
    try:
        return run.save_checkpoint(config.output_dir, config.checkpoints_total_limit, wait=wait)
    except UserError as error:
        warnings.warn(f"update {run.update} has no checkpoint, training goes on: {error}", Notice, stacklevel=2)
        return None


def _saved_progress(config: Any, run: TrainingRun) -> str:
    """Save a checkpoint, if checkpoints are on, without waiting for other processes; says so, for a message."""
    done = f"{run.update} of {run.updates} updates"
    saved = _save_checkpoint(config, run, wait=False) if config.checkpointing_steps and run.update else None
    return done if saved is None else f"{done}: {saved.name} is saved, go on with --resume_from_checkpoint latest"


def _unsaved_progress(config: Any, run: TrainingRun) -> str:
    """What is kept of a training that ends at once, for a message."""
    done, every = f"stopped after {run.update} of {run.updates} updates", config.checkpointing_steps
    if not every:
        return f"{done}: nothing is kept; with --checkpointing_steps 10 a training can go on where it was stopped"
    return f"{done}: --resume_from_checkpoint latest goes on from the last checkpoint, or begins anew"


@contextmanager
def _others_alive(config: Any, run: TrainingRun, stop: StopRequest) -> Iterator[None]:
    """Run the body; if another process of the launch has ended, the main one saves a checkpoint before all end.

    An update whose gradients could not be exchanged has changed nothing.

    Raises:
        UserError, Stopped: another process has ended; by a signal that this one has received too.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "by peer" in str(error)
        if run.accelerator.num_processes == 1 or isinstance(error, UserError) or not lost:
            raise
        done = _saved_progress(config, run) if run.accelerator.is_main_process else f"{run.update} updates"
        if stop.signal is not None:
            raise Stopped(stop.signal, f"stopped after {done}") from None
        raise UserError(f"another process of this launch has ended after {done}") from error


@contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Run the body with the folder `path` made, and locked against a second training into it.

    Raises:
        UserError: it cannot be written, another training writes into it, or it holds files of another origin that an
            adapter would replace.
    """
    if os.environ.get("RANK", "0") != "0":  # the main process has it
        yield
        return
    check_target(path)
    stopped = f"stopped before or after the updates: nothing in {path} is half-written; the same command begins anew"
    with folder_lock(path), said_if_stopped(stopped):
        yield


def check_same_data(about: Mapping[str, Any], accelerator: Accelerator) -> None:
    """UserError, on every process, unless all of a launch have the base, pictures and captions of a run's metadata.

    Processes on several machines read files of their own, and the updates would be those of a mixture.
    """
    if accelerator.num_processes == 1:
        return
    own = {name: about.get(name) for name in ("size", "caption", "captions", "data_sha256")}
    first, *others = gather_object([own | {"base": about["base"].get("sha256")}])
    for process, other in enumerate(others, 1):
        if differing := [name for name in first if other[name] != first[name]]:
            raise UserError(
                f"process {process} has {checkpoints.IN_WORDS[differing[0]]} than process 0, though all share each "
                "update: copy the same files, also class pictures, to every machine, or use a shared folder"
            )


def _resume(config: Any, run: TrainingRun) -> None:
    place, name = config.output_dir, config.resume_from_checkpoint
    checkpoint = checkpoints.find_together(place, name, run.accelerator, run.resumable_metadata(), run.updates)
    if checkpoint is not None:
        run.resume(checkpoint)
    if config.resume_from_checkpoint is not None:
        anew = f"Beginning anew: there is no whole checkpoint in {config.output_dir}"
        run.accelerator.print(f"Going on from {checkpoint.name}" if checkpoint else anew)


def finish(config: Any, accelerator: Accelerator) -> Path:
    """Upload the saved adapter if `config` asks for it, and close the trackers; returns the adapter's folder."""
    if accelerator.is_main_process:
        print(f"Adapter: {config.output_dir}")
        if config.push_to_hub:
            print(f"Uploaded: {hub.push(config.output_dir, repository(config))}")
    accelerator.end_training()
    return config.output_dir
