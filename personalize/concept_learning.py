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
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from personalize.adapter import Adapter
from personalize.attention import attention_sites
from personalize.concept_data import ConceptPicture, ConceptSamples, Example, check_prompt
from personalize.concepts import ConceptRows, initial_rows, installed, state
from personalize.data import Share
from personalize.errors import UserError
from personalize.formats import diffusers_file
from personalize.learning import Learning, versions
from personalize.lora import add_lora, lora_state, remove_lora
from personalize.model import StableDiffusion
from personalize.multi_concept import (
    CALIBRATION_WEIGHT,
    MultiConcept,
    calibration_layers,
    full_weights,
    low_rank,
    text_projections,
)


@dataclass(frozen=True)
class ConceptRecipe:
    """How concepts are learned.  The names are the trainer's options; the defaults are those of the method, for LoRA.

    An update uses `train_batch_size` samples, times `gradient_accumulation_steps`, times the number of processes.
    `calibration_weight` is against a mean squared error: see `personalize.multi_concept`; 0 is Custom Diffusion.
    """

    rank: int = 16
    lora_alpha: float | None = None  # None: the rank, so that alpha / rank = 1
    full_kv: bool = False
    learning_rate: float | None = None  # None: 5e-4, or 8e-5 for full_kv
    token_learning_rate: float = 5e-4
    adam_weight_decay: float = 1e-2
    max_train_steps: int = 250
    train_batch_size: int = 2
    gradient_accumulation_steps: int = 4
    calibration_weight: float = CALIBRATION_WEIGHT
    prior_loss_weight: float = 1.0
    mask_weight: float = 0.0
    initializer_token: str = "ktn+pll+ucd"
    augment: bool = True
    swap_subjects: float = 0.5
    max_grad_norm: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        positive = {"rank", "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "lora_alpha",
                    "learning_rate", "max_grad_norm"}  # fmt: skip
        not_negative = {"token_learning_rate", "adam_weight_decay", "calibration_weight", "prior_loss_weight",
                        "mask_weight"}  # fmt: skip
        for name, value in asdict(self).items():
            if name in positive and value is not None and not value > 0:
                raise UserError(f"{name} must be above 0, got {value}")
            if name in not_negative and value is not None and not value >= 0:
                raise UserError(f"{name} must be 0 or more, got {value}")
        if not 0 <= self.swap_subjects <= 1:
            raise UserError(f"swap_subjects is a share from 0 to 1, got {self.swap_subjects}")

    @property
    def alpha(self) -> float:
        return float(self.rank if self.lora_alpha is None or self.full_kv else self.lora_alpha)

    @property
    def rate(self) -> float:
        """The rate of the LoRA or of the full weights."""
        return self.learning_rate or (8e-5 if self.full_kv else 5e-4)

    @property
    def early_stop_loss(self) -> None:
        """Never stops early: the loss says little about likeness."""

    def initializer(self, index: int) -> str:
        """The word whose row concept `index` starts from; "class" is its own class phrase."""
        words = self.initializer_token.split("+")
        return words[index % len(words)]


@contextmanager
def teaching(
    model: StableDiffusion,
    picture: ConceptPicture,
    recipe: ConceptRecipe | None = None,
    *,
    examples: Sequence[Example] = (),
    resolution: int | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[ConceptLearning]:
    """A run that learns the subjects of `picture`, with `examples` as regularisation; on leaving, `model` is as it was.

    Raises:
        UserError: settings that cannot work, a prompt that does not name every subject once, tokens that are taken.
    """
    recipe = recipe or ConceptRecipe()
    check_prompt(model, picture)
    rows = {s.token: initial_rows(model, s, recipe.initializer(i)) for i, s in enumerate(picture.subjects)}
    with ExitStack() as stack:
        stack.callback(_restore, [(p, p.requires_grad) for part in _parts(model) for p in part.parameters()])
        layers = stack.enter_context(installed(model, rows, trainable=True))
        if recipe.full_kv:
            base = stack.enter_context(full_weights(model.unet))
        else:
            base = {}
            add_lora(model.unet, text_projections(model.unet), recipe.rank, recipe.alpha, recipe.seed)
            stack.callback(remove_lora, model.unet)
        yield ConceptLearning(model, picture, recipe, layers, base, examples, resolution, accelerator)


def _parts(model: StableDiffusion) -> tuple[Any, ...]:
    return (model.unet, *model.text_encoders)


def _restore(flags: list[tuple[torch.nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        parameter.requires_grad_(flag).grad = None


class ConceptLearning(Learning):
    """One run.  Make it with `teaching`, which cleans up; `update` counts the finished updates of `updates`."""

    def __init__(
        self,
        model: StableDiffusion,
        subject_picture: ConceptPicture,
        recipe: ConceptRecipe,
        layers: list[ConceptRows],
        base: dict[str, Tensor],
        examples: Sequence[Example],
        resolution: int | None,
        accelerator: Accelerator | None,
    ) -> None:
        self.model, self.caption, self.recipe = model, subject_picture.prompt, recipe  # pyright: ignore
        self.subjects, self.layers, self.weights_before = subject_picture.subjects, layers, base
        self.accelerator = accelerator or Accelerator(
            cpu=model.device.type == "cpu", gradient_accumulation_steps=recipe.gradient_accumulation_steps
        )
        self.share = Share(
            recipe.train_batch_size, recipe.gradient_accumulation_steps,
            self.accelerator.process_index, self.accelerator.num_processes,
        )  # fmt: skip
        self.update, self.updates = 0, recipe.max_train_steps
        multiple = 8 * model.factor
        side = (resolution or model.resolution) // multiple * multiple
        if side < multiple:
            raise UserError(f"resolution {resolution} px is too small: this base model needs at least {multiple} px")
        self.size = (side, side)
        self.picture = ConceptSamples(  # pyright: ignore
            model, subject_picture, side, recipe.seed, examples, recipe.augment, recipe.swap_subjects
        )
        self.data_sha256 = _digest(subject_picture, examples)
        self.map_layers = self._layers_of_maps()
        self.objective = MultiConcept(  # pyright: ignore
            model, layers, calibration_weight=recipe.calibration_weight, prior_loss_weight=recipe.prior_loss_weight,
            mask_weight=recipe.mask_weight if subject_picture.masks else 0.0, full_kv=recipe.full_kv,
        )  # fmt: skip
        groups = self.objective.groups(recipe.rate, recipe.token_learning_rate, recipe.adam_weight_decay)  # pyright: ignore
        optimizer = torch.optim.AdamW(groups, fused=model.device.type in ("cuda", "cpu"))
        self._prepared, self.optimizer = self.accelerator.prepare(self.objective, optimizer)

    def _layers_of_maps(self) -> dict[str, str]:
        """The layers that are calibrated, with the size of their maps; UserError if there is none but should be."""
        if not self.recipe.calibration_weight and not self.recipe.mask_weight:  # pyright: ignore
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

    def _lora(self) -> tuple[dict[str, Tensor], float]:
        """The adapter's tensors, and the share of the change they miss (0 unless trained in full)."""
        if not self.weights_before:
            return lora_state(self.model.unet), 0.0
        return low_rank(self._changes(), self.recipe.rank)

    def loadable(self) -> dict[str, bytes]:
        return {"pytorch_lora_weights.safetensors": diffusers_file(self._lora()[0], self.recipe.alpha)}

    def adapter(self, **info: Any) -> Adapter:
        """What has been learned so far: LoRA and tokens; `info` is added to what the adapter records of its making."""
        lora, missed = self._lora()
        told = {"full_kv_residual": round(missed, 6)} if self.weights_before else {}
        about = {**self.about(), "updates": self.update, "versions": versions(), **told, **info}
        return Adapter(
            lora, self.recipe.rank, self.recipe.alpha, None, about, concepts=state(self.layers, self.subjects)
        )

    def about(self) -> dict[str, Any]:
        """What decides the outcome of this run, as plain values."""
        return {
            "base": {**self.model.identity, "prediction_type": self.model.prediction_type},
            "caption": self.caption,
            "subjects": [asdict(subject) for subject in self.subjects],
            "targets": "cross_attention_kv",
            "calibrated": self.map_layers,
            "size": list(self.size),
            "seed": self.recipe.seed,
            "standalone": True,
            "processes": self.share.processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "data_sha256": self.data_sha256,
            "config": asdict(self.recipe),
        }


def _digest(picture: ConceptPicture, examples: Sequence[Example]) -> str:
    """One hash of the picture, its masks, and the regularisation captions and pictures."""
    found = sha256()
    for image in (picture.image, *picture.masks):
        found.update(f"{image.size}".encode() + image.tobytes())
    for example in examples:
        content = example.picture
        found.update(example.caption.encode())
        found.update(content.tobytes() if isinstance(content, Image.Image) else content.read_bytes())
    return found.hexdigest()
