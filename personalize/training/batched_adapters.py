"""Several adapters trained in one batch: one pass through the base for n pictures, each with a LoRA of its own.

    L = Σ over adapters of (mean over the adapter's own samples)

so that each adapter gets exactly the gradient that it would get alone.  AdamW works entry by entry, so n adapters are
trained as tensors with a leading dimension n.  The results equal those of n separate runs, up to rounding, which
differs with the batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from personalize.adapters.adapter import Adapter
from personalize.adapters.lora import PREFIX, lora_layers
from personalize.errors import UserError
from personalize.io.progress import ticked
from personalize.models.prompts import tokenize_prompt
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.training.config import SingleImageConfig
from personalize.training.data.buckets import FittedImage, as_fitted
from personalize.training.data.samples import SampleShard
from personalize.training.loop import StepReport, adamw, make_lr_scheduler, training_steps
from personalize.training.losses import LossTerms
from personalize.training.single_image import Captions, SingleImageRun, single_image_run
from personalize.training.single_image_objective import SingleImageObjective

StackedLora = dict[str, tuple[nn.Parameter, nn.Parameter]]  # by layer: A (n, rank, …) and B (n, out, rank, …)


class BatchedAdapters(SingleImageObjective):
    """The loss of n adapters, summed; trains their stacked LoRA tensors and a source embedding for each.

    A batch holds the samples of the first adapter, then as many of the second, and so on; the `rows` of the samples are
    the numbers of their adapters.
    """

    def __init__(self, model: StableDiffusion, source: Conditioning, stacked: StackedLora, **settings: Any) -> None:
        """`source` has a row for each adapter; `settings` as in `SingleImageObjective`."""
        super().__init__(model, source, **settings)
        self.count = len(source)
        self.stacked = nn.ParameterList([parameter for pair in stacked.values() for parameter in pair])

    def forward(self, batch: dict[str, Tensor]) -> LossTerms:
        """The summed loss; its `parts` are the loss of each adapter, by number."""
        errors, weights = self.sample_errors(batch)
        if "share" in batch:
            errors = errors * batch["share"]
        each = (weights * errors).view(self.count, -1).mean(1)  # (n,)
        return LossTerms(each.sum(), {str(number): loss for number, loss in enumerate(each.detach())})

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Stacked A and B of every LoRA layer, A before B."""
        return list(self.stacked)


def check_batchable(config: SingleImageConfig) -> None:
    """UserError, in one line, if several adapters cannot be trained in one batch under `config`."""
    obstacles = (
        (config.train_text_encoder, "train_text_encoder, whose encoders would need several LoRAs"),
        (config.instance_token is not None, "instance_token, whose embeddings would share an entry of the vocabulary"),
        (config.early_stop_loss is not None, "early_stop_loss, which ends each at another update"),
        (config.max_grad_norm is not None, "max_grad_norm, which is of one adapter"),
        (config.use_8bit_adam, "use_8bit_adam, whose scales would be shared"),
        (config.cuda_graph, "cuda_graph, which holds one adapter"),
        (config.use_ema, "use_ema, whose averages are of one adapter"),
        (config.orthogonal_start, "orthogonal_start, whose factors are not stacked"),
    )
    for hinders, reason in obstacles:
        if hinders:
            raise UserError(f"adapters_per_batch does not go with {reason}")


def learn_batched(
    model: StableDiffusion,
    pictures: Sequence[tuple[Tensor | Sequence[FittedImage], Captions]],
    config: SingleImageConfig,
    *,
    accelerator: Accelerator | None = None,
) -> list[tuple[Adapter, float]]:
    """Train an adapter for each (pixels (p, 3, H, W), caption), all of one size; returns each with its last loss.

    The pictures of one adapter have one caption, and each adapter has as many pictures as any other.

    Raises:
        UserError: a configuration under which they cannot be trained together.
        NonFiniteError: the loss or a gradient of any one is NaN or infinite.
    """
    check_batchable(config)
    fitted = [as_fitted(pixels) for pixels, _ in pictures]
    if len({image.size for images in fitted for image in images}) != 1 or len({*map(len, fitted)}) != 1:
        raise ValueError("adapters that are learned together need pictures of one size, and as many each")
    if any(not isinstance(caption, str) and len({*caption}) > 1 for _, caption in pictures):
        raise ValueError("adapters that are learned together need one caption each")
    texts = (caption if isinstance(caption, str) else caption[0] for _, caption in pictures)
    lengths = [tokenize_prompt(model, text).length for text in texts]
    results: dict[int, tuple[Adapter, float]] = {}
    for length in dict.fromkeys(lengths):  # captions of another number of chunks have source embeddings of their own
        numbers = [number for number, other in enumerate(lengths) if other == length]
        alike = _learn_alike(model, [pictures[number] for number in numbers], config, accelerator)
        results |= dict(zip(numbers, alike, strict=True))
    return [results[number] for number in range(len(pictures))]


def _learn_alike(
    model: StableDiffusion,
    pictures: Sequence[tuple[Tensor | Sequence[FittedImage], Captions]],
    config: SingleImageConfig,
    accelerator: Accelerator | None,
) -> list[tuple[Adapter, float]]:
    """`learn_batched` for captions of equally many chunks of 75 tokens."""
    with single_image_run(model, *pictures[0], config, accelerator=accelerator) as first:
        runs = [first] + [SingleImageRun(model, *picture, config, None, (), accelerator) for picture in pictures[1:]]
        layers, start = lora_layers(model.unet), first.objective.adapter_parameters()  # of one seed: the same for all
        stacked = [nn.Parameter(p.detach().expand(len(runs), *p.shape).clone()) for p in start]
        lora: StackedLora = dict(zip(layers, zip(stacked[::2], stacked[1::2], strict=True), strict=True))
        objective = BatchedAdapters(
            model, Conditioning.cat([run.conditioning for run in runs]), lora,
            standalone=config.source_embedding_frozen, snr_gamma=config.snr_gamma, null=first.null,
        )  # fmt: skip
        from personalize.adapters.lora_layers import batched_adapters  # peft takes seconds to import

        with batched_adapters(layers, lora):
            reports = ticked(_steps(runs, objective), f"Learning {len(runs)} adapters", total=first.updates)
            losses = [report.losses for report in reports][-1]
    sources = objective.source_embeddings()
    adapters = [
        run.make_adapter(_lora_of(lora, number), sources[number : number + 1], run.updates)
        for number, run in enumerate(runs)
    ]
    return [(adapter, float(losses[str(number)])) for number, adapter in enumerate(adapters)]


def _steps(runs: Sequence[SingleImageRun], objective: BatchedAdapters) -> Iterator[StepReport]:
    """Train `objective` on the batches of all `runs`, with the settings of the first, which all share."""
    first = runs[0]
    groups = objective.groups(first.config.learning_rate, first.config.text_embedding_lr)
    plain = adamw(groups, first.model.device)
    lr_scheduler = make_lr_scheduler(first.config, plain, first.updates)
    prepared, optimizer = first.accelerator.prepare(objective, plain, device_placement=[False, False])
    updates = _joined_updates(runs, first.shard, first.updates)
    return training_steps(prepared, updates, optimizer, accelerator=first.accelerator, lr_scheduler=lr_scheduler)


def _joined_updates(
    runs: Sequence[SingleImageRun], shard: SampleShard, updates: int
) -> Iterator[list[dict[str, Tensor]]]:
    """The batches of each update, those of all runs joined: the samples of one run after those of another."""
    for alike in zip(*(run.dataset.updates(shard, 0, updates) for run in runs), strict=True):
        yield [_joined(batches) for batches in zip(*alike, strict=True)]


def _joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batches of several runs as one, in which a sample's row is the number of its run."""
    counts = torch.tensor([len(batch["rows"]) for batch in batches])
    if any("weights" in batch for batch in batches):  # of some pictures only a part is shown
        batches = [{"weights": torch.ones_like(batch["latents"][:, :1])} | batch for batch in batches]
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return joined | {"rows": torch.arange(len(batches)).repeat_interleave(counts)}


def _lora_of(stacked: StackedLora, number: int) -> dict[str, Tensor]:
    """The LoRA tensors of adapter `number`, fp32 on the CPU, by the names they have in adapter files."""
    return {
        f"{PREFIX}{name}.lora_{letter}.weight": pair[index].detach()[number].float().cpu().clone()
        for name, pair in stacked.items()
        for index, letter in enumerate("AB")
    }
