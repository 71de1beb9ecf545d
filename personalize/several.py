"""Several adapters learned in one batch: one pass through the base for n pictures, each sample with a LoRA of its own.

    L = Σ over adapters of (mean over the adapter's own samples)

so that each adapter gets exactly the gradient that it would get alone; AdamW works entry by entry, so that n adapters
are one with a leading dimension.  What is learned equals one run after another up to the rounding of other batch sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from personalize.adapter import Adapter
from personalize.data import SampleShard
from personalize.errors import UserError
from personalize.learning import SingleImageRun, single_image_run, versions
from personalize.lora import PREFIX, lora_layers
from personalize.lora_layers import several
from personalize.losses import LossTerms
from personalize.model import Conditioning, StableDiffusion
from personalize.objectives import SingleImageObjective
from personalize.recipes import SingleImageConfig
from personalize.training import StepReport, adamw, training_steps

Rows = dict[str, tuple[nn.Parameter, nn.Parameter]]


class BatchedAdapters(nn.Module):
    """The objective of n adapters: that of one picture, summed; owns their stacked A and B, and a source row each."""

    def __init__(self, inner: SingleImageObjective, rows: Rows) -> None:
        super().__init__()
        self.inner, self.count = inner, len(inner.embeds)
        self.pairs = nn.ParameterList([parameter for pair in rows.values() for parameter in pair])

    def forward(self, batch: dict[str, Tensor]) -> LossTerms:
        errors, weights = self.inner.errors(batch)
        each = (weights * errors).view(self.count, -1).mean(1)  # (n,)
        parts = {str(number): loss for number, loss in enumerate(errors.detach().view(self.count, -1).mean(1))}
        return LossTerms(each.sum(), parts)


def check_batchable(recipe: SingleImageConfig) -> None:
    """UserError, in one line, if adapters cannot be learned together under `recipe`."""
    obstacles = (
        (recipe.train_text_encoder, "train_text_encoder, whose encoders would need several LoRAs"),
        (recipe.early_stop_loss is not None, "early_stop_loss, which ends each at another update"),
        (recipe.max_grad_norm is not None, "max_grad_norm, which is of one adapter"),
        (recipe.use_8bit_adam, "use_8bit_adam, whose scales would be shared"),
        (recipe.cuda_graph, "cuda_graph, which holds one adapter"),
    )
    for hinders, reason in obstacles:
        if hinders:
            raise UserError(f"adapters_per_batch does not go with {reason}")


def learn_batched(
    model: StableDiffusion,
    pictures: Sequence[tuple[Tensor, str]],
    recipe: SingleImageConfig,
    *,
    accelerator: Accelerator | None = None,
) -> list[tuple[Adapter, float]]:
    """An adapter and its last loss for each (pixels (1, 3, H, W), caption), all of one size; see `single_image_run`.

    Raises:
        UserError: a recipe under which they cannot be learned together.
        NonFiniteError: the loss or gradient of any one is no number.
    """
    check_batchable(recipe)
    if len({pixels.shape for pixels, _ in pictures}) != 1:
        raise ValueError("pictures that are learned together need one size")
    with single_image_run(model, *pictures[0], recipe, accelerator=accelerator) as host:
        runs = [host] + [SingleImageRun(model, *picture, recipe, None, (), accelerator) for picture in pictures[1:]]
        layers, start = lora_layers(model.unet), host.objective.adapter_parameters()  # of one seed, and so of all
        stacked = [nn.Parameter(p.detach().expand(len(runs), *p.shape).clone()) for p in start]
        rows = dict(zip(layers, zip(stacked[::2], stacked[1::2], strict=True), strict=True))
        told = Conditioning.cat([run.told for run in runs])
        inner = SingleImageObjective(model, told, standalone=recipe.source_embedding_frozen, snr_gamma=recipe.snr_gamma)
        with several(layers, rows):
            last = [report.losses for report in _steps(host, runs, BatchedAdapters(inner, rows))][-1]
    return [(_adapter(run, rows, inner, number), float(last[str(number)])) for number, run in enumerate(runs)]


def _steps(host: SingleImageRun, runs: Sequence[SingleImageRun], objective: BatchedAdapters) -> Iterator[StepReport]:
    recipe, inner = host.recipe, objective.inner
    text = [p for p in (inner.embeds, inner.pooled) if p is not None and p.requires_grad]
    groups: list[dict[str, Any]] = [{"params": list(objective.pairs), "lr": recipe.learning_rate}]
    groups += [{"params": text, "lr": recipe.text_embedding_lr}] if text else []
    prepared, optimizer = host.accelerator.prepare(objective, adamw(groups, host.model.device))
    return training_steps(prepared, _batches(runs, host.share, host.updates), optimizer, accelerator=host.accelerator)


def _batches(runs: Sequence[SingleImageRun], share: SampleShard, updates: int) -> Iterator[dict[str, Tensor]]:
    """Every run's own batches, one run's samples after another's."""
    for batches in zip(*(run.picture.batches(share, 0, updates) for run in runs), strict=True):
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        counts = [len(batch["rows"]) for batch in batches]
        yield joined | {"rows": torch.arange(len(runs)).repeat_interleave(torch.tensor(counts))}


def _adapter(run: SingleImageRun, rows: Rows, inner: SingleImageObjective, number: int) -> Adapter:
    """What adapter `number` has become."""
    lora = {
        f"{PREFIX}{name}.lora_{letter}.weight": pair[index].detach()[number].float().cpu().clone()
        for name, pair in rows.items()
        for index, letter in enumerate("AB")
    }
    learned = {"embeds": inner.embeds, "pooled": inner.pooled}
    source = {key: p.detach()[number : number + 1].cpu().clone() for key, p in learned.items() if p is not None}
    recipe = run.recipe
    info = {**run.about(), "updates": run.updates, "versions": versions()}
    return Adapter(lora, recipe.rank, recipe.alpha, None if recipe.without_source_embedding else source, info)
