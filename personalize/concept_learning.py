"""Learn several concepts of one picture: everything between a loaded base model and a finished adapter.

picture = ConceptPicture(image, (Subject("<cat1>", "cat"), Subject("<dog1>", "dog")))
with teaching(model, picture, ConceptRecipe()) as run:
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

from personalize.adapter import Adapter
from personalize.attention import attention_sites
from personalize.concept_data import ClassImage, ConceptDataset, ConceptPicture, check_prompt, digest
from personalize.concepts import ConceptRows, initial_rows, installed, state
from personalize.errors import UserError
from personalize.lean import fast_paths
from personalize.learning import SingleImageRun, versions
from personalize.lora import add_lora, lora_aside, lora_state
from personalize.model import StableDiffusion
from personalize.multi_concept import (
    MultiConceptObjective,
    calibration_layers,
    full_weights,
    low_rank,
    text_projections,
)
from personalize.recipes import MultiConceptConfig
from personalize.training import gradient_checkpointing, restored


@contextmanager
def multi_concept_run(
    model: StableDiffusion,
    picture: ConceptPicture,
    recipe: MultiConceptConfig | None = None,
    *,
    examples: Sequence[ClassImage] = (),
    resolution: int | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[MultiConceptRun]:
    """A run that learns the subjects of `picture`, with `examples` as regularisation; on leaving, `model` is as it was.

    Raises:
        UserError: settings that cannot work, a prompt that does not name every subject once, tokens that are taken.
    """
    recipe = recipe or MultiConceptConfig()
    check_prompt(model, picture)
    rows = {s.token: initial_rows(model, s, recipe.initializer(i)) for i, s in enumerate(picture.subjects)}
    with ExitStack() as stack:
        stack.enter_context(restored(model))
        stack.enter_context(fast_paths(model.unet))
        stack.enter_context(gradient_checkpointing(model.unet, recipe.gradient_checkpointing))
        layers = stack.enter_context(installed(model, rows, trainable=True))
        if recipe.full_kv:
            base = stack.enter_context(full_weights(model.unet))
        else:
            base = {}
            add_lora(model.unet, text_projections(model.unet), recipe.rank, recipe.alpha, recipe.seed)
        yield MultiConceptRun(model, picture, recipe, layers, base, examples, resolution, accelerator)


class MultiConceptRun(SingleImageRun):
    """One run.  Make it with `multi_concept_run`, which cleans up; `update` counts the finished updates of `updates`."""

    def __init__(
        self,
        model: StableDiffusion,
        subject_picture: ConceptPicture,
        recipe: MultiConceptConfig,
        layers: list[ConceptRows],
        base: dict[str, Tensor],
        examples: Sequence[ClassImage],
        resolution: int | None,
        accelerator: Accelerator | None,
    ) -> None:
        self._begin(model, recipe, accelerator)
        self.caption, self.updates = subject_picture.prompt, recipe.max_train_steps
        self.subjects, self.layers, self.weights_before = subject_picture.subjects, layers, base
        self.anchoring = recipe.anchoring_weight if subject_picture.masks else 0.0
        multiple = 8 * model.factor
        side = (resolution or model.resolution) // multiple * multiple
        if side < multiple:
            raise UserError(f"resolution {resolution} px is too small: this base model needs at least {multiple} px")
        self.size = (side, side)
        self.picture = ConceptDataset(  # pyright: ignore
            model, subject_picture, side, recipe.seed, examples, recipe.augment, recipe.swap_subjects
        )
        self.data_sha256 = _digest(subject_picture, examples)
        self.map_layers = self._layers_of_maps()
        self.objective = MultiConceptObjective(  # pyright: ignore
            model, layers, calibration_weight=recipe.calibration_weight, prior_loss_weight=recipe.prior_loss_weight,
            mask_weight=self.anchoring, full_kv=recipe.full_kv,
        )  # fmt: skip
        self._optimise(self.objective.groups(recipe.rate, recipe.token_learning_rate, recipe.adam_weight_decay))

    def _layers_of_maps(self) -> dict[str, str]:
        """The layers that are calibrated, with the size of their maps; UserError if there is none but should be."""
        if not self.recipe.calibration_weight and not self.anchoring:
            return {}
        size = (self.size[0] // self.model.factor, self.size[1] // self.model.factor)
        sites = attention_sites(self.model.unet, size)
        names = calibration_layers(self.model.unet, size)
        return {name: f"{sites[name].height}×{sites[name].width}" for name in names}

    def _moved(self) -> bool:
        if not self.weights_before:
            return super()._moved()
        return any(bool(change.any()) for change in self._changes().values())

    def _changes(self) -> dict[str, Tensor]:
        """ΔW of every projection trained in full."""
        weights = {name: self.model.unet.get_submodule(name).weight.detach() for name in self.weights_before}
        return {name: weights[name] - before for name, before in self.weights_before.items()}

    def _approximated(self) -> tuple[dict[str, Tensor], float]:
        """The adapter's tensors, and the share of the change they miss (0 unless trained in full)."""
        if not self.weights_before:
            return lora_state(self.model.unet), 0.0
        return low_rank(self._changes(), self.recipe.rank)

    def _lora(self) -> dict[str, Tensor]:
        return self._approximated()[0]

    @contextmanager
    def showing(self) -> Iterator[Adapter]:
        """As in `SingleImageRun`; the tokens stay in the model, where a prompt finds them as they are now."""
        learned = {name: self.model.unet.get_submodule(name).weight for name in self.weights_before}
        now = {name: weight.detach().clone() for name, weight in learned.items()}
        adapter = replace(self.adapter(), concepts={})
        with lora_aside(self.model.unet), torch.no_grad():
            try:
                for name, weight in learned.items():
                    weight.copy_(self.weights_before[name])
                yield adapter
            finally:
                for name, weight in learned.items():
                    weight.copy_(now[name])

    def adapter(self, **info: Any) -> Adapter:
        """What has been learned so far: LoRA and tokens; `info` is added to what the adapter records of its making."""
        lora, missed = self._approximated()
        told = {"full_kv_residual": round(missed, 6)} if self.weights_before else {}
        about = {**self.about(), "updates": self.update, "versions": versions(), **told, **info}
        return Adapter(
            lora, self.recipe.rank, self.recipe.alpha, None, about, concepts=state(self.layers, self.subjects)
        )

    def _own(self) -> dict[str, Any]:
        subjects = [asdict(subject) for subject in self.subjects]
        kind = {"targets": "cross_attention_kv", "standalone": True}
        return {"subjects": subjects, "calibrated": self.map_layers, **kind}


def _digest(picture: ConceptPicture, examples: Sequence[ClassImage]) -> str:
    """One hash of the picture, its masks, and the regularisation captions and pictures."""
    images = (picture.image, *picture.masks)
    own = [part for image in images for part in (f"{image.size}".encode(), image.tobytes())]
    return digest(*own, *(part for example in examples for part in example.parts()))
