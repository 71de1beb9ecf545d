"""What inverting a picture leaves behind: its latents from clean to noisy and what replays them, kept in a folder.

A `Trajectory` says what it was made of: picture, prompt, base, noise schedule, adapter and settings.  The hash of all
that is its `key`, by which it is found again; one that was made of anything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalize.attention import AttentionHook
from personalize.errors import UserError
from personalize.files import read_json, read_tensors, tensor_bytes, write_folder
from personalize.lora import lora_layers
from personalize.model import Conditioning, StableDiffusion
from personalize.moves import Moves, Step, moves
from personalize.sampling import Edit, LatentEdit, denoise

SCHEMA = 1
TENSORS, MANIFEST = "trajectory.safetensors", "trajectory.json"
PARTS = ("embeds", "pooled", "time_ids")  # of a conditioning
LEAST_SIGMA = 1e-4  # of a stored noise whose step has none: what it must correct is carried all the same


@dataclass(frozen=True)
class Trajectory:
    """The way of one picture from its latents to noise, and what it takes to come back.

    latents: (t+1, 1, c, h, w) fp32 on the CPU; number j is the one after j moves up: 0 the picture's, t the noisiest.
    conditioning: of the source prompt, one row.
    null: of the null pass: one row, or t rows in the order of sampling (null-text).
    noise: (t, 1, c, h, w) in the order of sampling, where the moves have noise (ddpm).
    about: what it was made of; see `made_of`.
    """

    latents: Tensor
    conditioning: Conditioning
    null: Conditioning
    about: Mapping[str, Any]
    noise: Tensor | None = None

    @property
    def method(self) -> str:
        return self.about["method"]

    @property
    def key(self) -> str:
        """Hash of what it was made of."""
        return key_of(self.about)

    def moves(self, model: StableDiffusion) -> Moves:
        """From noise back to the picture, with the stored noise if there is any.  UserError as in `check`."""
        self.check(model)
        eta = 0.0 if self.noise is None else 1.0
        plan = moves(model, self.about["steps"], strength=self.about["strength"], eta=eta)
        if self.noise is None:
            return plan
        return with_noise(plan, self.noise)

    def start(self, rows: int = 1) -> Tensor:
        """The noisiest latents, `rows` times."""
        return self.latents[-1].repeat(rows, 1, 1, 1)

    def edit(
        self, targets: Conditioning | None = None, *, guidance_scale: float = 7.5,
        hooks: Sequence[AttentionHook] = (), latent_edits: Sequence[LatentEdit] = (),
    ) -> Edit:  # fmt: skip
        """Sampling of the source (row 0) and of `targets` (rows 1 …) from `start`; the latent edits come after pinning.

        The source row of "ddpm" keeps the guidance it was solved with.  A method that varies conditionings from step to
        step replaces `conditioning` or `negative` of the edit by a function.
        """
        told = self.conditioning
        if targets is not None:
            told = Conditioning.cat([told.to(targets.embeds.device), targets])
        own = self.about["guidance_scale"] if self.noise is not None else guidance_scale
        scales = (own, *[guidance_scale] * (len(told) - 1))
        pins = (Pinned(self),) if self.method == "direct" else ()
        null = self.null if len(self.null) == 1 else self.null_at
        scale = scales if len(set(scales)) > 1 else own
        return Edit(told, null, scale, hooks=tuple(hooks), latent_edits=(*pins, *latent_edits))

    def null_at(self, step: Step, latents: Tensor) -> Conditioning:
        """The null pass's row of one step."""
        return self.null[step.index : step.index + 1]

    def replay(self, model: StableDiffusion, guidance_scale: float = 7.5) -> Tensor:
        """Clean latents (1, c, h, w) of the source, sampled again."""
        return denoise(model, self.start(), self.edit(guidance_scale=guidance_scale), self.moves(model))

    def check(self, model: StableDiffusion) -> None:
        """Raises UserError unless `model` is the base, in the noise schedule and with the adapter, it was made with."""
        self.require(identity(model))

    def require(self, wanted: Mapping[str, Any], where: str | Path = "") -> None:
        """Raises UserError, naming the first difference, unless it was made of what `wanted` says."""
        named = f" in {where}" if str(where) else ""
        for name, value in wanted.items():
            if self.about.get(name) != value:
                raise UserError(
                    f"the trajectory{named} was made with another {_WORDS.get(name, name)} "
                    f"({_short(self.about.get(name))}, now {_short(value)}): "
                    f"{'give it that, or ' if name in self.about else ''}invert the picture again into another folder"
                )

    def save(self, folder: str | Path) -> Path:
        """Write `folder`, all or nothing: the tensors, and as JSON what they were made of."""
        tensors = {"latents": self.latents}
        for stem, told in (("conditioning", self.conditioning), ("null", self.null)):
            parts = {f"{stem}.{part}": getattr(told, part) for part in PARTS}
            tensors |= {name: tensor.cpu() for name, tensor in parts.items() if tensor is not None}
        if self.noise is not None:
            tensors["noise"] = self.noise
        content = tensor_bytes(tensors)
        manifest = {"schema": SCHEMA, **self.about, "sha256": sha256(content).hexdigest()}
        files = {TENSORS: content, MANIFEST: json.dumps(manifest, indent=1).encode()}
        return write_folder(folder, files)

    @staticmethod
    def load(folder: str | Path) -> Trajectory:
        """Read a folder that `save` wrote.  UserError if it is none, is damaged, or of a later version."""
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder} holds no trajectory: it has no {MANIFEST}; name the folder inversion wrote")
        about = read_json(folder / MANIFEST)
        if about.pop("schema", None) != SCHEMA:
            raise UserError(f"{folder} was written by another version of this program: invert the picture again")
        tensors = read_tensors(folder / TENSORS).tensors
        if sha256((folder / TENSORS).read_bytes()).hexdigest() != about.pop("sha256", None):
            raise UserError(f"{folder / TENSORS} is not what was saved with its {MANIFEST}: invert the picture again")
        told, null = (
            Conditioning(*(tensors.get(f"{stem}.{part}") for part in PARTS))  # pyright: ignore[reportArgumentType]
            for stem in ("conditioning", "null")
        )
        return Trajectory(tensors["latents"], told, null, about, tensors.get("noise"))


class Pinned(LatentEdit):
    """Direct inversion: after every move the source row is put back on the trajectory; the other rows are not touched.

        z_src ← z_src + (z*_{t′} − z_src) = z*_{t′}

    References: Ju et al., "Direct Inversion", arXiv 2310.01506, algorithm 1.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self.pivots = trajectory.latents

    def latents(self, z: Tensor, step: Step) -> Tensor:
        return torch.cat([self.pivots[step.count - 1 - step.index].to(z), z[1:]])


_WORDS = {"base": "base model", "schedule": "noise schedule", "image": "picture", "told": "text encoder or token"}


def with_noise(plan: Moves, noise: Tensor) -> Moves:
    """The moves of `plan` with stored `noise` (t, 1, c, h, w); every one has a σ."""
    pairs = zip(plan.steps, noise, strict=True)
    return replace(plan, steps=tuple(replace(move, noise=n, sigma=max(move.sigma, LEAST_SIGMA)) for move, n in pairs))


def identity(model: StableDiffusion) -> dict[str, Any]:
    """What of `model` a trajectory depends on: the base, its noise schedule, and the adapter in its UNet, as hashes."""
    schedule = digest([model.alphas_cumprod, torch.tensor(model.final_alpha)], model.prediction_type)
    layers = lora_layers(model.unet)
    adapter = None
    if layers:
        state = {name: tensor for name, tensor in model.unet.state_dict().items() if ".lora_" in name}
        adapter = digest(state.values(), repr([(name, layer.scaling) for name, layer in layers.items()]))
    return {"base": model.identity["sha256"], "schedule": schedule, "adapter": adapter}


def made_of(
    model: StableDiffusion, pixels: Tensor, prompt: str, told: Conditioning, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything a trajectory depends on, JSON-able: its `about`."""
    parts = [getattr(told, part) for part in PARTS]
    hashes = {"image": digest([pixels]), "told": digest([part for part in parts if part is not None])}
    about = {"precision": str(model.dtype), "name": model.name, "prompt": prompt, "size": list(pixels.shape[-2:])}
    return {**settings, **identity(model), **about, **hashes}


def key_of(about: Mapping[str, Any]) -> str:
    return sha256(json.dumps({**about, "name": ""}, sort_keys=True).encode()).hexdigest()


def digest(tensors: Any, text: str = "") -> str:
    """SHA-256 of tensors, bit by bit, and of `text`."""
    found = sha256(text.encode())
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"{text[1:9]}…" if isinstance(value, str) and len(value) == 64 else text
