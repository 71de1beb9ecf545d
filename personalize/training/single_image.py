"""Train an adapter on one picture of a subject, or on a few.

    with single_image_run(model, pixels, "a photo of a dog", SingleImageConfig(rank=8)) as run:
        for report in run.steps():
            print(report.update, float(report.losses["loss"]))
        adapter = run.adapter()

`learn` does the same in one call.  The trainer, the quick start and the editor all train through this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from personalize.adapters.adapter import Adapter
from personalize.adapters.lora import add_lora, lora_state, module_names
from personalize.adapters.subjects import Subject, read_trigger
from personalize.adapters.text_encoder_lora import add_text_lora, text_lora_state
from personalize.adapters.textual_inversion import TokenEmbedding, initial_embeddings, installed_tokens, token_state
from personalize.adapters.timestep_mask import timestep_mask
from personalize.errors import UserError
from personalize.models.fast_paths import compiled_blocks, fast_paths, in_precision
from personalize.models.gradient_checkpointing import gradient_checkpointing
from personalize.models.stable_diffusion import Conditioning, StableDiffusion
from personalize.training.config import SingleImageConfig, check_warmup
from personalize.training.data.buckets import FittedImage, as_fitted, fit_into
from personalize.training.data.concepts import ClassImage, content_hash
from personalize.training.data.samples import LatentDataset, SampleShard
from personalize.training.loop import restored, training_dtype
from personalize.training.run import TrainingRun, versions
from personalize.training.single_image_objective import SingleImageObjective

Captions = str | Sequence[str]  # one for all pictures, or one for each


@contextmanager
def single_image_run(
    model: StableDiffusion,
    pixels: Tensor | Sequence[FittedImage],
    caption: Captions,
    config: SingleImageConfig | None = None,
    *,
    masks: Tensor | None = None,
    class_images: Sequence[ClassImage] = (),
    accelerator: Accelerator | None = None,
) -> Iterator[SingleImageRun]:
    """Prepare a run that trains an adapter on `pixels` (p, 3, H, W) in [−1, 1] with their `caption`.

    On leaving the context, `model` is as it was before.

    Args:
        pixels: or pictures of different sizes, see `buckets.fit`, which bring masks of their own.
        masks: (p, 1, H, W) in [0, 1], 1 where the subject is; see `SingleImageConfig.mask_weight`.
        class_images: class pictures with captions, for prior preservation; shown whole in each size of the pictures.

    Raises:
        UserError: settings that cannot work, or a model that already carries an adapter.
    """
    config = config or SingleImageConfig()
    trigger = None if config.instance_token is None else read_trigger(config.instance_token, _texts(caption))
    start = {} if trigger is None else {trigger.token: initial_embeddings(model, trigger)}
    with (
        restored(model), in_precision(model.unet, training_dtype(model, accelerator)),
        compiled_blocks(model.unet, config.torch_compile), fast_paths(model.unet),
        gradient_checkpointing(model.unet, config.gradient_checkpointing),
        installed_tokens(model, start, trainable=True) as token_embeddings,
    ):  # fmt: skip
        with model.offload.idle(idle_parts(model, config), sparing=config.offload):  # each comes back to encode
            run = SingleImageRun(model, pixels, caption, config, masks, class_images, accelerator)
            run.add_adapter(trigger, token_embeddings)
            with timestep_mask(model.unet, run.timestep_rank()):
                yield run


def planned_updates(config: SingleImageConfig, pictures: int, shard: SampleShard) -> int:
    """The number of updates of a run on so many pictures; UserError if there are none, or all are warm-up."""
    updates = shard.updates(config.train_samples(pictures))
    check_warmup(config, updates)
    return updates


def check_sizes(config: SingleImageConfig, pictures: Sequence[FittedImage]) -> list[tuple[int, int]]:
    """The different sizes (H, W) of the `pictures`; UserError if a run cannot train on several."""
    sizes = list(dict.fromkeys(picture.size for picture in pictures))
    if config.cuda_graph and len(sizes) > 1:
        raise UserError(f"cuda_graph needs pictures of one shape, got {len(sizes)} sizes: leave it out")
    return sizes


def idle_parts(model: StableDiffusion, config: SingleImageConfig) -> list[Any]:
    """The parts of the base that a run uses before its first update and for previews alone."""
    return [model.vae, *(() if config.encodes_captions else model.text_encoders)]


def _texts(caption: Captions) -> Sequence[str]:
    return [caption] if isinstance(caption, str) else caption


def learn(
    model: StableDiffusion,
    pixels: Tensor | Sequence[FittedImage],
    caption: Captions,
    config: SingleImageConfig | None = None,
    *,
    accelerator: Accelerator | None = None,
) -> Adapter:
    """Train on `pixels` (p, 3, H, W) in [−1, 1] with their `caption` and return the adapter; see `single_image_run`."""
    with single_image_run(model, pixels, caption, config, accelerator=accelerator) as run:
        for _ in run.steps():
            pass
        return run.adapter()


class SingleImageRun(TrainingRun[SingleImageConfig, SingleImageObjective]):
    """A run that trains on one picture or a few; make it with `single_image_run`, which restores the model afterwards.

    Making one encodes the pictures and captions and leaves the model alone; `add_adapter` alters it.

    Attributes:
        captions: the different captions of the pictures, (p); the source embedding has a row for each.
        counts: how many pictures and class pictures there are, and of several captions how many have each, and the size
            of the first of them where sizes differ; no part of resuming.
        class_captions: the different captions of the class pictures.
        conditioning: the text encoders' output for the captions of the pictures, in this order.
        prior: that for the captions of the class pictures; None if there are none.
        null: that of the empty prompt; None if no sample is learned without its caption.
        trigger: the subject with its learned token; None without `instance_token`.
        token_embeddings: the text encoders' embedding layers, which hold the token's trained rows.
    """

    trigger: Subject | None = None
    token_embeddings: Sequence[TokenEmbedding] = ()

    def __init__(
        self,
        model: StableDiffusion,
        pixels: Tensor | Sequence[FittedImage],
        caption: Captions,
        config: SingleImageConfig,
        masks: Tensor | None,
        class_images: Sequence[ClassImage],
        accelerator: Accelerator | None,
    ) -> None:
        super().__init__(model, config, accelerator)
        images = as_fitted(pixels, masks)
        self.updates = planned_updates(config, len(images), self.shard)
        self.size, sizes = images[0].size, check_sizes(config, images)
        captions = [caption] * len(images) if isinstance(caption, str) else list(caption)
        if len(captions) != len(images):
            raise ValueError(f"{len(images)} pictures need one caption or as many, got {len(captions)}")
        self.captions, self.caption = tuple(dict.fromkeys(captions)), captions[0]
        self.counts: dict[str, Any] = {"pictures": len(images), "regularisation": len(class_images)}
        if len(self.captions) > 1:
            self.counts["caption_counts"] = [captions.count(text) for text in self.captions]
        if len(self.captions) > 1 and len(sizes) > 1:
            self.counts["caption_sizes"] = [list(images[captions.index(text)].size) for text in self.captions]
        self.class_captions = tuple(dict.fromkeys(image.caption for image in class_images))
        rows = [self.captions.index(text) for text in captions]
        turns = [*images, *(image.mirror() for image in images)] if config.random_flip else images
        dataset = self._encoded(turns, rows * (len(turns) // len(images)))
        prior = [self._encoded_class_images(class_images, size) for size in sizes if class_images]
        dataset, *prior = _alike((dataset, *prior))
        self.dataset = replace(dataset, prior=tuple(prior))
        own = [part for image in images for part in (image.pixels, image.mask, repr(image.time_ids).encode())]
        if 1 < len(self.captions) < len(images):  # else the captions say themselves which picture has which
            own.append(repr(rows).encode())
        self.data_sha256 = content_hash(*own, *(part for image in class_images for part in image.content()))
        self.texts = (*self.captions, *self.class_captions)
        with torch.no_grad():
            self.conditioning = model.prompts(self.captions, self.size)
            self.prior = model.prompts(self.class_captions, self.size) if self.class_captions else None
            self.null = model.null(1, self.size) if config.proportion_empty_prompts else None

    def _encoded(self, images: Sequence[FittedImage], rows: Sequence[int]) -> LatentDataset:
        """The pictures encoded, with the rows of their captions, loss weights, and SDXL's size conditioning."""
        model, config = self.model, self.config
        with model.offload.using(model.vae), fast_paths(model.vae.encoder):
            posteriors = [model.posterior(image.pixels) for image in images]  # one at a time, to save memory
        means, stds = ([part[0] for part in parts] for parts in zip(*posteriors, strict=True))
        weights = [image.weights(config.mask_weight) for image in images]
        cells = None
        if any(part is not None for part in weights):
            cells = [_cells(part, mean) for part, mean in zip(weights, means, strict=True)]
            if not all(bool(part.any()) for part in cells):
                raise UserError("a mask is black wherever its picture is used: paint white where the subject is")
        ids = [torch.tensor(image.time_ids, device=means[0].device) for image in images]
        return LatentDataset(
            means, stds, config.seed, config.resample_latents, len(model.alphas_cumprod), tuple(rows), cells,
            time_ids=ids if model.family == "sdxl" else None, empty_prompts=config.proportion_empty_prompts or None,
        )  # fmt: skip

    def _encoded_class_images(self, class_images: Sequence[ClassImage], size: tuple[int, int]) -> LatentDataset:
        """The class pictures, whole, encoded in `size`; their captions' rows come after those of the subject's."""
        rows = [len(self.captions) + self.class_captions.index(image.caption) for image in class_images]
        prior = self._encoded([fit_into(size, image.open()) for image in class_images], rows)
        own_captions = None if prior.empty_prompts is None else 0.0
        return replace(prior, purpose="class ", resample=True, empty_prompts=own_captions)

    def add_adapter(self, trigger: Subject | None = None, token_embeddings: Sequence[TokenEmbedding] = ()) -> None:
        """Add a new adapter to the model, and make the objective and its optimizer.

        `token_embeddings` are installed in the model and hold the rows of the `trigger`'s token.
        """
        self.trigger, self.token_embeddings = trigger, token_embeddings
        model, config = self.model, self.config
        names = module_names(model.unet, model.family, config.targets)
        settings, orthogonal = (config.rank, config.alpha, config.seed), config.orthogonal_start
        add_lora(model.unet, names, *settings, orthogonal=orthogonal)
        if config.train_text_encoder:
            add_text_lora(model, *settings, config.targets, orthogonal=orthogonal)
        objective = SingleImageObjective(
            model, self.conditioning, standalone=config.source_embedding_frozen, snr_gamma=config.snr_gamma,
            prior=self.prior, prior_loss_weight=config.prior_loss_weight,
            texts=self.texts if config.encodes_captions else (), size=self.size, null=self.null,
            rows=token_embeddings,
        )  # fmt: skip
        rates = config.learning_rate, config.text_embedding_lr, config.text_encoder_lr
        self.prepare(objective, objective.groups(*rates))

    @contextmanager
    def adapter_removed(self) -> Iterator[Adapter]:
        """As in `TrainingRun`; a learned token stays in the model, and the yielded adapter has none."""
        with super().adapter_removed() as adapter:
            yield replace(adapter, concepts={})

    def _adapter(self, **info: Any) -> Adapter:
        """What has been learned so far; `info` is added to the adapter's metadata."""
        return self.make_adapter(self.lora(), self.objective.source(), self.update, **info)

    def make_adapter(self, lora: dict[str, Tensor], source: Conditioning, updates: int, **info: Any) -> Adapter:
        """An adapter of these LoRA tensors and this source embedding (a row for each caption), with the run's metadata.

        With `standalone` it has no source embedding: there it is the text encoder's output for the caption.
        """
        parts = {"embeds": source.embeds, "pooled": source.pooled}
        embedding = {name: part.detach().to("cpu", copy=True) for name, part in parts.items() if part is not None}
        return Adapter(
            lora=lora,
            rank=self.config.file_rank,
            alpha=self.config.file_alpha,
            source=None if self.config.without_source_embedding else embedding,
            info={**self.metadata(), **self.counts, "updates": updates, "versions": versions(), **info},
            concepts={} if self.trigger is None else token_state(self.token_embeddings, [self.trigger]),
        )

    def lora(self) -> dict[str, Tensor]:
        return lora_state(self.model.unet) | text_lora_state(self.model)

    def _own_metadata(self) -> dict[str, Any]:
        captions = {"captions": list(self.captions)} if len(self.captions) > 1 else {}
        return {**captions, "targets": self.config.targets, "standalone": self.config.without_source_embedding}


def _alike(parts: Sequence[LatentDataset]) -> list[LatentDataset]:
    """`parts` whose samples all have weights if those of one have any, so that they can share a batch."""
    if all(part.weights is None for part in parts):
        return list(parts)
    ones = ([torch.ones_like(mean[:1]) for mean in part.mean] for part in parts)
    return [
        replace(part, weights=own if part.weights is None else part.weights)
        for part, own in zip(parts, ones, strict=True)
    ]


def _cells(weights: Tensor | None, mean: Tensor) -> Tensor:
    """Weights by pixel, (1, 1, H, W) or None for 1, as weights by latent position, (1, h, w)."""
    if weights is None:
        return torch.ones_like(mean[:1])
    return adaptive_avg_pool2d(weights.to(mean), (mean.shape[-2], mean.shape[-1]))[0]
