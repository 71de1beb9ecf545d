"""The result of inverting an image: its latents from clean to noisy and what sampling needs to return, in a folder.

A `Trajectory` records its inputs in `about`: image, prompt, base model, noise schedule, adapter and settings. Their
hash is its `key`, which names it in a cache. A trajectory whose inputs differ from the wanted ones is refused.
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

from personalize.adapters.lora import lora_layers
from personalize.errors import UserError
from personalize.io.atomic import write_folder
from personalize.io.json_files import read_json
from personalize.io.plain_files import file_hash
from personalize.io.tensor_files import read_tensors, tensor_bytes
from personalize.models.attention import AttentionHook
from personalize.models.known_bases import portable_name
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.models.transfer import sent
from personalize.sampling.config import TRAJECTORY
from personalize.sampling.denoise import Edit, LatentEdit, denoise
from personalize.sampling.schedule import Schedule, Step, make_schedule
from personalize.sampling.virtual_inversion import ConsistentRows

SCHEMA = 1
TENSORS, MANIFEST = "trajectory.safetensors", TRAJECTORY
PARTS = ("embeds", "pooled", "time_ids")  # of a conditioning
LEAST_SIGMA = 1e-4  # a last step with σ = 0 could not apply its stored noise, which corrects the latents exactly
CONDITIONING_KEY = "told"  # the key of the conditioning's hash in trajectory.json; files written so far have it


@dataclass(frozen=True)
class Trajectory:
    """The latents of one image at every noise level of its inversion, and what sampling them back requires.

    latents: (t+1, 1, c, h, w), fp32 on the CPU; number j is the result of j inversion steps: 0 is the encoded image, t
        the noisiest.
    conditioning: of the source prompt, one row.
    null: of the unconditional pass: one row, or t rows in the order of sampling (null-text inversion).
    noise: the noise of stochastic steps (ddpm), (t, 1, c, h, w) in the order of sampling.
    about: the inputs it was computed from, see `fingerprint`.
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
        """SHA-256 of the inputs, in hex digits."""
        return fingerprint_hash(self.about)

    def schedule(self, model: StableDiffusion) -> Schedule:
        """The schedule from noise back to the image, with the stored noise if any; UserError as in `check`."""
        self.check(model)
        eta = 0.0 if self.noise is None else 1.0
        spacing = self.about.get("spacing")
        down = make_schedule(model, self.about["steps"], strength=self.about["strength"], eta=eta, spacing=spacing)
        return down if self.noise is None else with_noise(down, self.noise)

    def start(self, rows: int = 1) -> Tensor:
        """The noisiest latents (rows, c, h, w), from which sampling starts; all rows are equal."""
        return self.latents[-1].repeat(rows, 1, 1, 1)

    def edit(
        self, targets: Conditioning | None = None, *, guidance_scale: float = 7.5,
        hooks: Sequence[AttentionHook] = (), latent_edits: Sequence[LatentEdit] = (),
    ) -> Edit:  # fmt: skip
        """The edit that samples the source (row 0) and `targets` (rows 1 …) from `start`.

        With direct inversion the source row is pinned to the trajectory after each step, before `latent_edits`; without
        inversion it is the photo with fresh noise, and the targets are corrected by its error. The
        source row of ddpm inversion keeps the guidance scale it was inverted with. A method whose conditioning varies
        by step replaces `conditioning` or `negative` of the returned edit by a function.

        Raises:
            ValueError: `targets` have another number of text positions than the source: see `beside` of `invert`.
        """
        conditioning = self.conditioning
        if targets is not None:
            conditioning = Conditioning.cat([conditioning.to(targets.embeds.device), targets])
        source_scale = self.about["guidance_scale"] if self.noise is not None else guidance_scale
        # each row's is used as it is, and for one below 1 its prompt would count less, not alone
        scales = (max(1.0, source_scale), *[max(1.0, guidance_scale)] * (len(conditioning) - 1))
        pins = {"direct": (Pinned(self),), "none": (ConsistentRows(self.latents),)}.get(self.method, ())
        null = self.null if len(self.null) == 1 else self.null_at
        scale = scales if len(set(scales)) > 1 else source_scale
        return Edit(conditioning, null, scale, hooks=tuple(hooks), latent_edits=(*pins, *latent_edits))

    def null_at(self, step: Step, latents: Tensor) -> Conditioning:
        """The unconditional row (1, l, d) of one step, where every step has its own."""
        return self.null[step.index : step.index + 1]

    def replay(self, model: StableDiffusion, guidance_scale: float = 7.5) -> Tensor:
        """Sample the source back from noise: clean latents (1, c, h, w)."""
        return denoise(model, self.start(), self.edit(guidance_scale=guidance_scale), self.schedule(model))

    def check(self, model: StableDiffusion) -> None:
        """Raise UserError unless `model` has the base, noise schedule and adapter that the image was inverted with."""
        self.require(model_fingerprint(model))

    def require(self, wanted: Mapping[str, Any], where: str | Path = "") -> None:
        """Raise UserError, naming the first difference, unless the inputs in `about` are as `wanted` says."""
        named = f" in {where}" if str(where) else ""
        for name, value in wanted.items():
            if self.about.get(name) != value:
                raise UserError(
                    f"the trajectory{named} was made with another {_WORDS.get(name, name)} "
                    f"({_short(self.about.get(name))}, now {_short(value)}): "
                    f"{'give it that, or ' if name in self.about else ''}invert the picture again into another folder"
                )

    def save(self, folder: str | Path) -> Path:
        """Write the tensors, and the inputs as JSON, into `folder`; it is written completely or not at all."""
        tensors = {"latents": self.latents}
        for stem, rows in (("conditioning", self.conditioning), ("null", self.null)):
            parts = {f"{stem}.{part}": getattr(rows, part) for part in PARTS}
            tensors |= {name: tensor.cpu() for name, tensor in parts.items() if tensor is not None}
        if self.noise is not None:
            tensors["noise"] = self.noise
        content = tensor_bytes(tensors)
        manifest = {"schema": SCHEMA, **self.about, "sha256": sha256(content).hexdigest()}
        files = {TENSORS: content, MANIFEST: json.dumps(manifest, indent=1).encode()}
        return write_folder(folder, files)

    @staticmethod
    def load(folder: str | Path) -> Trajectory:
        """Read a folder that `save` wrote; UserError if it holds no trajectory, is damaged or has another schema."""
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder} holds no trajectory: it has no {MANIFEST}; name the folder inversion wrote")
        about = read_json(folder / MANIFEST)
        if about.pop("schema", None) != SCHEMA:
            raise UserError(f"{folder} was written by another version of this program: invert the picture again")
        tensors = read_tensors(folder / TENSORS).tensors
        if file_hash(folder / TENSORS) != about.pop("sha256", None):
            raise UserError(f"{folder / TENSORS} is not what was saved with its {MANIFEST}: invert the picture again")
        conditioning, null = (
            Conditioning(*(tensors.get(f"{stem}.{part}") for part in PARTS))  # pyright: ignore[reportArgumentType]
            for stem in ("conditioning", "null")
        )
        return Trajectory(tensors["latents"], conditioning, null, about, tensors.get("noise"))


class Pinned(LatentEdit):
    """Direct inversion: sets the source row to the stored latents after every step; the other rows are not changed.

        z_src ← z_src + (z*_{t′} − z_src) = z*_{t′}

    References: Ju et al., "Direct Inversion", arXiv 2310.01506, algorithm 1.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self.pivots = trajectory.latents

    def latents(self, z: Tensor, step: Step) -> Tensor:
        return torch.cat([sent(self.pivots[step.count - 1 - step.index], z.device).to(z), z[1:]])


_WORDS = {  # what error messages call an input
    "base": "base model", "schedule": "noise schedule", "image": "image",
    CONDITIONING_KEY: "text encoder, token or length of prompts",
}  # fmt: skip


def with_noise(schedule: Schedule, noise: Tensor) -> Schedule:
    """`schedule` with stored `noise` (t, 1, c, h, w); every transition gets a σ of at least `LEAST_SIGMA`."""
    pairs = zip(schedule.steps, noise, strict=True)
    steps = (replace(step, noise=n, sigma=max(step.sigma, LEAST_SIGMA)) for step, n in pairs)
    return replace(schedule, steps=tuple(steps))


def model_fingerprint(model: StableDiffusion) -> dict[str, Any]:
    """SHA-256 hashes of what a trajectory depends on in `model`: base, autoencoder, noise schedule, the UNet's adapter.

    The schedule's hash is of its noise levels and of what the timesteps of a number of steps depend on.
    """
    config = model.scheduler.config
    timesteps = f"{config.get('timestep_spacing')} {config.get('steps_offset')}"
    levels = [model.alphas_cumprod, torch.tensor(model.final_alpha)]
    schedule = tensor_hash(levels, f"{model.prediction_type} {timesteps}")
    layers = lora_layers(model.unet)
    adapter = None
    if layers:
        state = {name: tensor for name, tensor in model.unet.state_dict().items() if ".lora_" in name}
        masks = {mask.name for layer in layers.values() if (mask := getattr(layer, "_mask", None)) is not None}
        settings = repr([(name, layer.scaling) for name, layer in layers.items()]) + "".join(sorted(masks))
        adapter = tensor_hash(state.values(), settings)
    for others, strength in model.changes:
        unet = {module: parts for module, parts in others.items() if module.startswith("unet.")}
        named = {f"{module} {role}": tensor for module, parts in unet.items() for role, tensor in parts.items()}
        adapter = tensor_hash(named.values(), f"{adapter} {list(named)} {strength}")
    base = {"base": model.identity["sha256"], "autoencoder": _autoencoder_hash(model)}
    return {**base, "schedule": schedule, "adapter": adapter}


def _autoencoder_hash(model: StableDiffusion) -> str:
    """SHA-256 of the autoencoder's scaling, names, shapes and 64 values of every weight, in hex digits."""
    weights = model.vae.state_dict()
    values = [weight.reshape(-1)[:: max(1, weight.numel() // 64)][:64].float() for weight in weights.values()]
    shapes = [(name, tuple(weight.shape)) for name, weight in weights.items()]
    return tensor_hash([torch.cat(values)], f"{model.vae.config.scaling_factor} {shapes}")


def fingerprint(
    model: StableDiffusion, pixels: Tensor, prompt: str, conditioning: Conditioning, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All inputs of an inversion as JSON values, tensors as hashes: what `Trajectory.about` holds."""
    parts = [part for part in (getattr(conditioning, name) for name in PARTS) if part is not None]
    hashes = {"image": tensor_hash([pixels]), CONDITIONING_KEY: tensor_hash(parts)}
    about = {
        "precision": str(model.dtype),
        "name": portable_name(model.name),
        "prompt": prompt,
        "size": list(pixels.shape[-2:]),
    }
    return {**settings, **model_fingerprint(model), **about, **hashes}


def fingerprint_hash(about: Mapping[str, Any]) -> str:
    """SHA-256 of a `fingerprint`, in hex digits; the base model's name does not count, its weights do."""
    return sha256(json.dumps({**about, "name": ""}, sort_keys=True).encode()).hexdigest()


def tensor_hash(tensors: Any, text: str = "") -> str:
    """SHA-256 of `text` and of the bytes of tensors, in hex digits."""
    total = sha256(text.encode())
    for tensor in tensors:
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _short(value: Any) -> str:
    """A value for an error message; hashes are cut to 8 digits."""
    text = json.dumps(value, ensure_ascii=False)
    return f"{text[1:9]}…" if isinstance(value, str) and len(value) == 64 else text
