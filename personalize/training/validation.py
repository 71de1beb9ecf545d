"""Validation pictures drawn while training, by the code of `personalize edit`; a failure never ends the run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.editing.config import Sampling
from personalize.editing.editor import Editor
from personalize.errors import first_line
from personalize.io.atomic import write_file
from personalize.io.figures import png
from personalize.io.image_folders import VALIDATION
from personalize.io.images import psnr, to_image, to_pixels
from personalize.io.provenance import GENERATED
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training.data.buckets import FittedImage, as_fitted
from personalize.training.saving import save_trained

if TYPE_CHECKING:
    from personalize.training.best_weights import BestWeights, Judge
    from personalize.training.run import TrainingRun


def draw(run: TrainingRun, prompt: str, *, count: int, steps: int) -> list[Image.Image]:
    """`count` pictures of `prompt` (seeds 0, 1, …) by the adapter as it is now; training can go on afterwards."""
    with run.averaged(), run.adapter_removed() as adapter:
        return Editor(run.model, adapter).edit(prompt, seeds=range(count), sampling=Sampling(steps))


def validate(run: TrainingRun, config: Any, judge: Judge | None = None) -> list[Path]:
    """Draw --validation_prompt, write output_dir/validation/N-i.png, and log the pictures; returns their paths.

    With a `judge`, the run keeps its weights of now if the pictures have the best score so far.
    A failure becomes a warning.  Only the main process draws; the others wait for it at the next update.
    """
    if not run.accelerator.is_main_process:
        return []
    steps = config.preview_steps or 30
    try:
        images = draw(run, config.validation_prompt, count=config.num_validation_images, steps=steps)
        paths = [config.output_dir / VALIDATION / f"{run.update:06d}-{number}.png" for number in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            write_file(path, png(image, GENERATED))
        _log_images(run, images)
        if judge is not None and run.best is not None:
            _keep_if_best(run, run.best, judge(images))
    except Exception as error:  # any failure: pictures must not cost the training
        message = f"update {run.update}: no validation pictures, training goes on: {first_line(error)}"
        warnings.warn(message, stacklevel=2)
        return []
    return paths


def _keep_if_best(run: TrainingRun, best: BestWeights, score: float) -> None:
    with run.averaged():
        better = best.consider(run.update, score)
    run.accelerator.log({"score": score}, step=run.update)
    run.accelerator.print(f"update {run.update}: score {score:.3f}{', the best so far' * better}")


def _log_images(run: TrainingRun, images: Sequence[Image.Image]) -> None:
    for tracker in run.accelerator.trackers:
        if tracker.name == "tensorboard":
            stack = np.stack([np.asarray(image) for image in images])
            tracker.log_images({VALIDATION: stack}, step=run.update, dataformats="NHWC")  # pyright: ignore
        elif tracker.name == "wandb":
            tracker.log_images({VALIDATION: list(images)}, step=run.update)  # pyright: ignore


def save_with_preview(
    model: StableDiffusion, adapter: Adapter, picture: Tensor | FittedImage, folder: Path, *, steps: int = 30,
    seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Save the adapter, and then again with the pictures and figures of `preview` on its card; returns the figures.

    A preview that fails, e.g. for lack of memory, costs the pictures alone: it is a warning, and a line on the card.
    """
    if steps > 0:
        save_trained(adapter, folder)
    try:
        figures, pictures = preview(model, adapter, picture, steps=steps, seed=seed)
        added: dict[str, Any] = dict(figures)
    except Exception as error:  # any failure: the pictures must not cost the training
        reason = first_line(error)
        warnings.warn(f"{folder} is saved, without a preview: {reason}", stacklevel=2)
        figures, pictures, added = {}, {}, {"preview_failed": reason}
    save_trained(replace(adapter, info={**adapter.info, **added}), folder, pictures=pictures)
    return figures


def preview(
    model: StableDiffusion, adapter: Adapter, picture: Tensor | FittedImage, *, steps: int = 30, seed: int = 0
) -> tuple[dict[str, float], dict[str, Image.Image]]:
    """PSNR figures in dB against the source `picture` (1, 3, H, W), and the pictures "source" and "reconstruction".

    The padding of a picture that is fitted into a size does not count: it is not learned.

    `autoencoder_db` is what the base's autoencoder reaches, and so the most that any adapter can; `reconstruction_db`
    is the source drawn by the adapter; `standalone_gap_db` is how much of it is lost in programs that cannot load the
    source embedding.  With `steps` = 0 nothing is drawn, and there are no figures.
    """
    fitted = as_fitted(picture)[0] if isinstance(picture, Tensor) else picture
    source = fitted.pixels.detach().cpu()
    pictures = {"source": to_image(source)}
    if steps < 1:
        return {}, pictures

    def likeness(drawn: Tensor) -> float:
        return psnr(fitted.own_part(drawn), fitted.own_part(source))

    def reconstruct(part: Adapter) -> Image.Image:
        return Editor(model, part).reconstruct(seeds=[seed], sampling=Sampling(steps=steps))[0]

    pictures["reconstruction"] = reconstruct(adapter)
    figures = {
        "autoencoder_db": likeness(model.decode(model.encode(source)).cpu()),
        "reconstruction_db": likeness(to_pixels(pictures["reconstruction"])),
    }
    if adapter.source is not None:
        standalone = likeness(to_pixels(reconstruct(replace(adapter, source=None))))
        figures["standalone_gap_db"] = figures["reconstruction_db"] - standalone
    return {name: round(value, 2) for name, value in figures.items()}, pictures
