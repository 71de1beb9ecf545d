"""Estimate how much memory a training run will take, from one sample measured before it starts.

    peak = max(updates, encoding, decoding)             updates = base + P · (4 + 4 + s) + c + b · a
    encoding = base + v + max(n, e)                     decoding = base + P · (4 + s) + c + max(n, v + d)

base: bytes of the UNet, and of those of autoencoder and text encoders that updates use, without the adapter.
v, n: bytes of autoencoder and text encoders if they are off the device during updates (`models.idle_parts`), else 0.
    Both are there when the base has been loaded; afterwards each comes back by itself, when it is used.
P: number of trained parameters, in fp32: 4 bytes of weight, 4 of gradient, and s = 8 of AdamW's two moments (8-bit: 2,
    and 8 bytes of scales for every 256 parameters, but still 8 in tensors of fewer than 4,096).
c: bytes of what is kept beside these: with use_ema the average of what is trained, with full_kv the weights before
    training, and with cuda_graph all samples of the run.
a: the peak of the bytes that the forward and backward pass of one sample allocate; b: samples in a batch.
e, d: the peak of the bytes that the autoencoder allocates for one picture to encode it, and to decode it for a preview.

Not counted: the device's own context and work spaces (about 1 GB on CUDA), fragmentation, other programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from personalize.errors import UserError
from personalize.models.loading import has_bf16
from personalize.models.memory import LiveBytes, decoding_bytes, encoding_bytes
from personalize.models.quantization import weight_bytes
from personalize.models.vae import TILE
from personalize.training.data.samples import SampleShard

if TYPE_CHECKING:
    from personalize.models.stable_diffusion import StableDiffusion
    from personalize.training.run import TrainingRun

SMALL_TENSOR, BLOCK = 4096, 256  # parameters: see bitsandbytes' 8-bit optimizers in the docstring


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the training device; `sample` is the activations of one sample, `batch` the samples in a batch.

    `copies` are those of what is trained, `samples` those that a CUDA graph reads, `unet` the UNet's frozen weights,
    which are a part of `base`.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    sample: int
    batch: int
    idle_vae: int = 0
    idle_encoders: int = 0
    encoding_picture: int = 0
    decoding_picture: int = 0
    copies: int = 0
    samples: int = 0
    unet: int = 0

    @property
    def idle(self) -> int:
        """The bytes of what is off the device during the updates."""
        return self.idle_vae + self.idle_encoders

    @property
    def kept(self) -> int:
        """The bytes that are neither base, adapter nor optimizer, and stay: c of this module's docstring."""
        return self.copies + self.samples

    @property
    def activations(self) -> int:
        return self.batch * self.sample

    @property
    def updates(self) -> int:
        return self.base + self.adapter + self.gradients + self.optimizer + self.kept + self.activations

    @property
    def encoding(self) -> int:
        return self.base + self.idle_vae + max(self.idle_encoders, self.encoding_picture)

    @property
    def decoding(self) -> int:
        used = max(self.idle_encoders, self.idle_vae + self.decoding_picture)
        return self.base + self.adapter + self.optimizer + self.kept + used

    @property
    def total(self) -> int:
        return max(self.updates, self.encoding, self.decoding)

    def __str__(self) -> str:
        phases = {"the updates": self.updates, "encoding": self.encoding, "previews": self.decoding}
        kept = f"copies and samples {readable(self.kept)}, " if self.kept else ""
        return (
            f"Memory, about {readable(self.total)}: base {readable(self.base)}, adapter with gradients "
            f"{readable(self.adapter + self.gradients)}, optimizer {readable(self.optimizer)}, {kept}"
            f"activations of {self.batch} sample{'s' * (self.batch > 1)} {readable(self.activations)}; "
            f"most in {max(phases, key=phases.__getitem__)}: "
            + ", ".join(f"{name} {readable(count)}" for name, count in phases.items())
        )


def estimate(run: TrainingRun) -> MemoryEstimate:
    """The memory that `run` will take, measured by a forward and backward pass of one sample, which changes nothing.

    Raises:
        UserError: not even one sample fits.
    """
    trained = list(run.objective.trainable().values())
    sizes = [parameter.numel() for parameter in trained]
    adapter = 4 * sum(sizes)
    model, size = run.model, run.size
    idle_vae, idle_encoders = (
        sum(weight_bytes(part) for part in some if part in model.offload) for some in ([model.vae], model.text_encoders)
    )
    parts = parts_of_updates(model)
    moments = [adam_8bit_bytes(size) if run.config.use_8bit_adam else 8 * size for size in sizes]
    trained_in_base = sum(4 * p.numel() for part in parts for p in part.parameters() if p.requires_grad)
    base = sum(map(weight_bytes, parts)) - trained_in_base
    sample = sample_bytes(run)
    return MemoryEstimate(
        base, adapter, adapter, sum(moments), sample, run.shard.largest,
        idle_vae, idle_encoders, encoding_bytes(model.vae, size), decoded_bytes(run, tiled=model.offload.tiled),
        copied_bytes(run), stored_samples_bytes(run), sum(weight.nbytes for weight in frozen_weights(model.unet)),
    )  # fmt: skip


def parts_of_updates(model: StableDiffusion) -> list[nn.Module]:
    """The parts of the base that are on the device during updates."""
    return [part for part in (model.unet, model.vae, *model.text_encoders) if part not in model.offload]


def frozen_weights(module: nn.Module) -> list[nn.Parameter]:
    """The weights of `module` that are not trained."""
    return [weight for weight in module.parameters() if not weight.requires_grad]


def copied_bytes(run: TrainingRun) -> int:
    """The bytes of the copies of what is trained that a run has: its average, and with full_kv the weights before."""
    average = {} if run.average is None else run.average.values
    return sum(tensor.nbytes for kept in (average, getattr(run, "weights_before", {})) for tensor in kept.values())


def stored_samples_bytes(run: TrainingRun) -> int:
    """The bytes of all samples that are left of the run, which a CUDA graph reads; 0 without one."""
    if not run.config.cuda_graph:
        return 0
    sample = sum(part.nbytes for part in _one_sample(run).values() if isinstance(part, Tensor))
    return (run.updates - run.update) * run.shard.samples * sample


def _one_sample(run: TrainingRun) -> dict[str, Any]:
    """A batch of one sample, with its class picture if there is one."""
    return next(run.dataset.updates(SampleShard(1), 0, 1))[0]


def decoded_bytes(run: TrainingRun, *, tiled: bool) -> int:
    """The most bytes that the autoencoder allocates to decode the run's picture, at once or in tiles."""
    height, width = run.size
    return decoding_bytes(run.model.vae, (min(height, TILE), min(width, TILE)) if tiled else (height, width))


def unused_savings(run: TrainingRun) -> list[str]:
    """The options that save memory and are not given yet, the cheapest first; `memory_advice` says what each saves."""
    config, model = run.config, run.model
    halves = model.device.type != "cpu" and model.dtype == torch.float32 and not getattr(config, "full_kv", False)
    options = {
        f"--mixed_precision {'bf16' if has_bf16(model.device) else 'fp16'}": halves,
        "--offload": hasattr(config, "offload") and not model.offload.tiled,
        "--train_batch_size 1": run.shard.largest > 1,
        "--use_8bit_adam": not config.use_8bit_adam,
        "--gradient_checkpointing": not config.gradient_checkpointing,
        "--load_in_4bit": "quantisation" not in run.base and not getattr(config, "full_kv", False),
    }
    return [option for option, free in options.items() if free]


def adam_8bit_bytes(size: int) -> int:
    """Bytes of both moments of a tensor of `size` parameters in 8-bit AdamW."""
    return 8 * size if size < SMALL_TENSOR else 2 * size + 8 * -(-size // BLOCK)


def readable(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def sample_bytes(run: TrainingRun) -> int:
    """The peak of the bytes allocated by one sample's forward and backward pass.

    Raises:
        UserError: not even one sample fits.
    """
    trained = list(run.objective.trainable().values())
    batch = _one_sample(run)
    inputs = (value for value in batch.values() if isinstance(value, Tensor))
    parts = (run.objective, run.model.unet, run.model.vae, *run.model.text_encoders)
    existing = [*(tensor for part in parts for tensor in _tensors(part)), *inputs]
    try:
        with LiveBytes(existing) as live, run.accelerator.autocast():
            torch.autograd.grad(run.objective(batch).total, trained, allow_unused=True)
    except torch.OutOfMemoryError:
        options = [one for one in unused_savings(run) if one != "--train_batch_size 1"] + ["a lower --resolution"]
        raise UserError(f"not even one sample fits into memory: add {', then '.join(options)}") from None
    return live.peak


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
