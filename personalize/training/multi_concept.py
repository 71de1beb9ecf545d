"""Train an adapter on several concepts of one picture.

picture = ConceptPicture(image, (Subject("<cat1>", "cat"), Subject("<dog1>", "dog")))
with multi_concept_run(model, picture, MultiConceptConfig()) as run:
    for report in run.steps():
        print(report.update, float(report.losses["loss"]))
    adapter = run.adapter()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from personalize.adapters.adapter import Adapter
from personalize.adapters.lora import add_lora, lora_removed, lora_state
from personalize.adapters.merging import low_rank
from personalize.adapters.textual_inversion import (
    TokenEmbedding,
    initial_embeddings,
    installed_tokens,
    token_state,
    with_distinct_starts,
)
from personalize.adapters.timestep_mask import timestep_mask
from personalize.errors import UserError
from personalize.io.images import fitted_size
from personalize.models.attention import attention_sites
from personalize.models.attention_maps import calibration_layers
from personalize.models.fast_paths import compiled_blocks, fast_paths, in_precision
from personalize.models.gradient_checkpointing import gradient_checkpointing
from personalize.models.stable_diffusion import StableDiffusion
from personalize.training.config import MultiConceptConfig
from personalize.training.data.concepts import ClassImage, ConceptDataset, ConceptPicture, check_prompt, content_hash
from personalize.training.loop import restored, training_dtype
from personalize.training.multi_concept_objective import MultiConceptObjective, full_weights, text_projections
from personalize.training.run import TrainingRun, versions


@contextmanager
def multi_concept_run(
    model: StableDiffusion,
    picture: ConceptPicture,
    config: MultiConceptConfig | None = None,
    *,
    class_images: Sequence[ClassImage] = (),
    resolution: int | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[MultiConceptRun]:
    """Prepare a run that learns the subjects of `picture`, with `class_images` as regularisation.

    On leaving the context, `model` is as it was before.

    Args:
        resolution: side of a square picture in pixels, rounded down to what the base can take; by default its own.
            Pictures of other shapes have about as many pixels.

    Raises:
        UserError: settings that cannot work, a prompt that does not name every subject once, or tokens that the
            tokenizer already has.
    """
    config = config or MultiConceptConfig()
    check_prompt(model, picture)
    words = [config.initializer(index, len(picture.subjects)) for index in range(len(picture.subjects))]
    starts = {s.token: initial_embeddings(model, s, word) for s, word in zip(picture.subjects, words, strict=True)}
    rows = with_distinct_starts(starts, config.seed)
    with ExitStack() as stack:
        stack.enter_context(restored(model))
        dtype = None if config.full_kv else training_dtype(model, accelerator)
        stack.enter_context(in_precision(model.unet, dtype))
        stack.enter_context(compiled_blocks(model.unet, config.torch_compile))
        stack.enter_context(fast_paths(model.unet))
        stack.enter_context(gradient_checkpointing(model.unet, config.gradient_checkpointing))
        layers = stack.enter_context(installed_tokens(model, rows, trainable=True))
        if config.full_kv:
            weights_before = stack.enter_context(full_weights(model.unet))
        else:
            weights_before = {}
            names, settings = text_projections(model.unet), (config.rank, config.alpha, config.seed)
            add_lora(model.unet, names, *settings, orthogonal=config.orthogonal_start)
        run = MultiConceptRun(model, picture, config, layers, weights_before, class_images, resolution, accelerator)
        stack.enter_context(timestep_mask(model.unet, run.timestep_rank()))
        yield run


def training_side(model: StableDiffusion, resolution: int | None) -> int:
    """Side of a square picture in pixels: `resolution`, by default the base's own, rounded down to what it takes.

    Raises:
        UserError: it is too small for the base.
    """
    multiple = 8 * model.factor
    side = (resolution or model.resolution) // multiple * multiple
    if side < multiple:
        raise UserError(f"resolution {resolution} px is too small: this base model needs at least {multiple} px")
    return side


def training_size(model: StableDiffusion, picture: ConceptPicture, resolution: int | None) -> tuple[int, int]:
    """(H, W) of the bucket in which `picture` is trained; see `training_side` for `resolution` and errors."""
    side = training_side(model, resolution)
    return fitted_size(picture.image.height, picture.image.width, side, 8 * model.factor)


def map_sizes(model: StableDiffusion, size: tuple[int, int]) -> dict[str, str]:
    """The layers whose attention maps are read of a picture of `size` (H, W), with the maps' size, e.g. "16×16".

    Raises:
        UserError: the base has none that fit.
    """
    latents = (size[0] // model.factor, size[1] // model.factor)
    sites = attention_sites(model.unet, latents)
    return {name: f"{sites[name].height}×{sites[name].width}" for name in calibration_layers(model.unet, latents)}


def reads_maps(config: MultiConceptConfig, picture: ConceptPicture) -> bool:
    """Does the loss of a run on `picture` read attention maps?"""
    return bool(config.calibration_weight or (picture.masks and config.anchoring_weight))


class MultiConceptRun(TrainingRun[MultiConceptConfig, MultiConceptObjective]):
    """A run that trains on several concepts; make it with `multi_concept_run`, which restores the model afterwards.

    Attributes:
        fitted: the picture in its bucket, which is the run's size.
        subjects: the concepts, each with its token and class phrase.
        token_embeddings: the text encoders' embedding layers, which hold the trained rows of the tokens.
        weights_before: with `full_kv`, copies of the base's weights that are trained; otherwise empty.
        map_layers: the layers whose attention maps the loss reads, with the size of their maps ("16×16").
    """

    def __init__(
        self,
        model: StableDiffusion,
        picture: ConceptPicture,
        config: MultiConceptConfig,
        token_embeddings: list[TokenEmbedding],
        weights_before: dict[str, Tensor],
        class_images: Sequence[ClassImage],
        resolution: int | None,
        accelerator: Accelerator | None,
    ) -> None:
        super().__init__(model, config, accelerator)
        self.caption, self.updates, self.subjects = picture.prompt, config.max_train_steps, picture.subjects
        self.token_embeddings, self.weights_before = token_embeddings, weights_before
        self.anchoring_weight = config.anchoring_weight if picture.masks else 0.0
        self.class_images = class_images
        for image in class_images:
            image.open()  # a damaged one is found now, and not at the update that shows it
        self.dataset = data = ConceptDataset(
            model, picture, training_side(model, resolution), config.seed, class_images, config.augment,
            config.swap_subjects, config.random_flip,
        )  # fmt: skip
        self.fitted, self.size = data.fitted, data.fitted.size
        self.data_sha256 = _data_hash(data)
        self.map_layers = map_sizes(model, self.size) if reads_maps(config, picture) else {}
        objective = MultiConceptObjective(
            model, token_embeddings, calibration_weight=config.calibration_weight,
            prior_loss_weight=config.prior_loss_weight, mask_weight=self.anchoring_weight, full_kv=config.full_kv,
        )  # fmt: skip
        rates = config.weight_learning_rate, config.token_learning_rate, config.adam_weight_decay
        self.prepare(objective, objective.groups(*rates))

    def _any_weight_changed(self) -> bool:
        if not self.weights_before:
            return super()._any_weight_changed()
        return any(bool(change.any()) for change in self._changes().values())

    def _changes(self) -> dict[str, Tensor]:
        """The change ΔW of every weight that is trained in full, by module path."""
        weights = {name: self.model.unet.get_submodule(name).weight.detach() for name in self.weights_before}
        return {name: weights[name] - before for name, before in self.weights_before.items()}

    def _approximated(self) -> tuple[dict[str, Tensor], float]:
        """The LoRA tensors, and the part of ‖ΔW‖ that they miss: 0 unless weights are trained in full."""
        if not self.weights_before:
            return lora_state(self.model.unet), 0.0
        return low_rank(self._changes(), self.config.rank)

    @contextmanager
    def adapter_removed(self) -> Iterator[Adapter]:
        """Yield the adapter as it is now, and run the body on the base's weights; then training can go on.

        The tokens stay in the model, so that prompts in the body can use them; the yielded adapter has none.
        """
        trained = {name: self.model.unet.get_submodule(name).weight for name in self.weights_before}
        now = {name: weight.detach().clone() for name, weight in trained.items()}
        adapter = replace(self.adapter(), concepts={})
        with lora_removed(self.model.unet), torch.no_grad():
            try:
                for name, weight in trained.items():
                    weight.copy_(self.weights_before[name])
                yield adapter
            finally:
                for name, weight in trained.items():
                    weight.copy_(now[name])

    def _adapter(self, **info: Any) -> Adapter:
        """What has been learned so far, LoRA and tokens; `info` is added to the adapter's metadata."""
        lora, missed = self._approximated()
        residual = {"full_kv_residual": round(missed, 6)} if self.weights_before else {}
        return Adapter(
            lora=lora,
            rank=self.config.file_rank,
            alpha=self.config.file_alpha,
            source=None,
            info={**self.metadata(), "updates": self.update, "versions": versions(), **residual, **info},
            concepts=token_state(self.token_embeddings, self.subjects),
        )

    def _own_metadata(self) -> dict[str, Any]:
        subjects = [asdict(subject) for subject in self.subjects]
        kind = {"targets": "cross_attention_kv", "standalone": True}
        return {"subjects": subjects, "calibrated": self.map_layers, **kind}


def _data_hash(data: ConceptDataset) -> str:
    """One hash of the picture, its masks, the class pictures with their captions, and shapes that are not square.

    Squares, which earlier versions trained alike, have the hash that they had there.
    """
    square = (data.side, data.side)
    images = (data.picture.image, *data.picture.masks)
    own = [part for image in images for part in (f"{image.size}".encode(), image.tobytes())]
    shapes = [f"{size}".encode() for size in data.class_sizes if size != square]
    if data.model.family == "sdxl" and data.fitted.time_ids != (*square, 0, 0, *square):
        shapes.append(f"{data.fitted.time_ids}".encode())
    return content_hash(*own, *(part for image in data.class_images for part in image.content()), *shapes)
