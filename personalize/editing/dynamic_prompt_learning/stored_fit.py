"""Fit a dynamic prompt to an inverted photo, and keep it in a folder for the next edit of the same photo."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from personalize.editing.config import DynamicSettings
from personalize.editing.dynamic_prompt_learning.fit import DynamicFit, DynamicPrompt, Leakage, fit_on_trajectory
from personalize.editing.dynamic_prompt_learning.leakage import AttentionReport
from personalize.errors import UserError
from personalize.io.atomic import write_folder
from personalize.io.json_files import read_json
from personalize.io.plain_files import file_hash
from personalize.io.tensor_files import read_tensors, tensor_bytes
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.sampling.config import NullTextSettings
from personalize.sampling.denoise import Edit, denoise
from personalize.sampling.null_text import NullFit
from personalize.sampling.trajectory import Trajectory, tensor_hash

ROWS, ABOUT = "dynamic.safetensors", "dynamic.json"


@torch.no_grad()
def fit_dynamic_prompt(
    model: StableDiffusion, trajectory: Trajectory, prompt: str, report: AttentionReport, settings: DynamicSettings,
    *, size: tuple[int, int] | None = None, guidance_scale: float = 7.5, null_text: NullTextSettings | None = None,
    cache: str | Path | None = None,
) -> tuple[DynamicPrompt, Trajectory]:  # fmt: skip
    """Fit the nouns' embeddings for every step of `trajectory`; returns them and the trajectory to sample with them.

    After direct inversion they are fitted on the inverted latents. With `null_text`, null embeddings are fitted at the
    same steps, and the returned trajectory has them. Otherwise they are fitted while the source is sampled with
    guidance. `cache` is a folder where the result is stored under the hash of all inputs, and read from.
    """
    about = _inputs(trajectory, prompt, report, settings, guidance_scale, null_text)
    place = None if cache is None else Path(cache) / f"dynamic-{_hash(about)[:16]}"
    if place is not None and (place / ABOUT).is_file():
        return _load(place, trajectory, about, report)
    length, down = trajectory.conditioning.embeds.shape[1], trajectory.schedule(model)
    fit = DynamicFit(model, prompt, report.groups, report.background, settings, size, length)
    if null_text is not None:
        nulls = NullFit(model, trajectory.latents, fit.latest, trajectory.null[:1], guidance_scale, null_text)
        denoise(model, trajectory.start(), Edit(fit, nulls, guidance_scale), down)
        trajectory = _with_null(trajectory, nulls.fitted.to("cpu"))
    elif trajectory.method == "direct":
        fit_on_trajectory(fit, trajectory.latents, down)
    else:
        edit = replace(trajectory.edit(guidance_scale=guidance_scale), conditioning=fit)
        if trajectory.method == "negative":  # its null row is the source's own, or guidance would not cancel
            edit = replace(edit, negative=fit.latest)
        denoise(model, trajectory.start(), edit, down)
    if place is not None:
        _save(place, about, fit.result, trajectory.null)
    return fit.result, trajectory


def _inputs(
    trajectory: Trajectory, prompt: str, report: AttentionReport, settings: DynamicSettings, scale: float,
    null: NullTextSettings | None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that a fitted dynamic prompt depends on, as JSON values; guidance not on a direct trajectory."""
    on_trajectory = null is None and trajectory.method == "direct"
    background = None if report.background is None else tensor_hash([report.background])
    return {"trajectory": trajectory.key, "prompt": prompt, "groups": [asdict(group) for group in report.groups],
            "background": background, "settings": settings.inputs, "guidance_scale": None if on_trajectory else scale,
            "null_text": None if null is None else null.inputs}  # fmt: skip


def _hash(about: Mapping[str, Any]) -> str:
    return sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _save(place: Path, about: Mapping[str, Any], dynamic: DynamicPrompt, null: Conditioning) -> None:
    """Write a dynamic prompt and the null embeddings into the folder `place`, with their inputs."""
    tensors = {f"rows.{number}": torch.stack(rows) for number, rows in enumerate(zip(*dynamic.rows, strict=True))}
    parts = {"embeds": null.embeds, "pooled": null.pooled, "time_ids": null.time_ids}
    tensors |= {f"null.{name}": part.cpu() for name, part in parts.items() if part is not None}
    logs = {"first": dynamic.first_losses, "last": dynamic.last_losses}
    record: dict[str, Any] = {name: [asdict(one) for one in losses] for name, losses in logs.items()}
    record |= {"drift": dynamic.drift, "passes": dynamic.forward_passes, "backward": dynamic.backward_passes}
    content = tensor_bytes(tensors)
    manifest = {"made_of": about, "sha256": sha256(content).hexdigest(), **record}
    write_folder(place, {ROWS: content, ABOUT: json.dumps(manifest, indent=1).encode()})


def _load(
    place: Path, trajectory: Trajectory, about: Mapping[str, Any], report: AttentionReport
) -> tuple[DynamicPrompt, Trajectory]:
    """Read what `_save` wrote; UserError if it is damaged or has other inputs."""
    record, tensors = read_json(place / ABOUT), read_tensors(place / ROWS).tensors
    content = file_hash(place / ROWS)
    if record["made_of"] != json.loads(json.dumps(about)) or record["sha256"] != content:
        raise UserError(f"{place} has other inputs than its name says, or is damaged: remove it, it is computed again")
    stacks = [tensors[f"rows.{number}"] for number in range(sum(name.startswith("rows.") for name in tensors))]
    rows = [tuple(stack[index] for stack in stacks) for index in range(len(stacks[0]))]
    first, last = ([Leakage(**one) for one in record[name]] for name in ("first", "last"))
    dynamic = DynamicPrompt(about["prompt"], report.groups, rows, first, last, record["drift"], record["passes"],
                            record["backward"])  # fmt: skip
    if about["null_text"] is None:
        return dynamic, trajectory
    parts = (tensors.get(f"null.{name}") for name in ("embeds", "pooled", "time_ids"))
    return dynamic, _with_null(trajectory, Conditioning(*parts))  # pyright: ignore[reportArgumentType]


def _with_null(trajectory: Trajectory, null: Conditioning) -> Trajectory:
    """`trajectory` with fitted null embeddings, as null-text inversion returns it."""
    return replace(trajectory, null=null, about={**trajectory.about, "method": "null-text"})
