"""Training samples of several concepts: views of the one picture, and regularisation pictures beside them.

Every batch holds both kinds where there are regularisation pictures: the first half (rounded up) shows the picture.
As in `personalize.data`, a sample depends on the seed, its update and its index alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from personalize.concepts import Subject, check_new, installed, locate
from personalize.data import SampleShard
from personalize.errors import UserError
from personalize.images import resize_and_crop, load_image, to_pixels
from personalize.model import StableDiffusion
from personalize.randomness import generator
from personalize.views import arranged, canvas_mask, draw_order, draw_view, shown, squared


@dataclass(frozen=True)
class ConceptPicture:
    """A picture (square once it is here), the subjects in it, and the prompt that says each of their phrases once.

    masks: for each subject a grey picture of the same shape, white where it is; or none at all.
    """

    image: Image.Image
    subjects: tuple[Subject, ...]
    prompt: str = ""
    masks: tuple[Image.Image, ...] = ()

    def __post_init__(self) -> None:
        if not self.subjects:
            raise UserError("name at least one concept, e.g. '<cat1> cat'")
        if self.masks and len(self.masks) != len(self.subjects):
            raise UserError(f"{len(self.subjects)} concepts need as many masks or none, got {len(self.masks)}")
        if any(mask.size != self.image.size for mask in self.masks):
            sizes = ", ".join(f"{mask.width}×{mask.height}" for mask in self.masks)
            raise UserError(f"masks are {sizes} px, the picture {self.image.width}×{self.image.height}: make them so")
        object.__setattr__(self, "image", squared(self.image.convert("RGB")))
        object.__setattr__(self, "masks", tuple(squared(mask.convert("L")) for mask in self.masks))
        object.__setattr__(self, "prompt", " ".join(self.prompt.split()) or default_prompt(self.subjects))

    @property
    def class_prompt(self) -> str:
        """The prompt without the learned tokens: "photo of a cat and a dog"."""
        text = self.prompt
        for subject in self.subjects:
            text = text.replace(f"{subject.token} ", "")
        return text


def default_prompt(subjects: Sequence[Subject]) -> str:
    """`photo of a <a> cat and <b> dog`, the template of the released code."""
    return "photo of a " + " and ".join(subject.phrase for subject in subjects)


def check_prompt(model: StableDiffusion, picture: ConceptPicture) -> None:
    """UserError, showing the tokens, unless the tokens are new and the prompt names every subject in every view."""
    check_new(model, [subject.token for subject in picture.subjects])
    width = [encoder.config.hidden_size for encoder in model.text_encoders]
    names = ("text_encoder", "text_encoder_2")
    blank = {
        s.token: {n: torch.zeros(s.vectors, w) for n, w in zip(names, width, strict=False)} for s in picture.subjects
    }
    with installed(model, blank):
        locate(model, f"a far away {picture.prompt}", picture.subjects)


@dataclass(frozen=True)
class ClassImage:
    """A regularisation picture, as a file or in memory, and what it shows."""

    caption: str
    picture: Path | Image.Image

    def open(self) -> Image.Image:
        return load_image(self.picture) if isinstance(self.picture, Path) else self.picture

    def parts(self) -> tuple[bytes, bytes]:
        """What it consists of: the caption, and the picture's file or pixels."""
        content = self.picture.tobytes() if isinstance(self.picture, Image.Image) else self.picture.read_bytes()
        return self.caption.encode(), content


def class_pixels(examples: Sequence[ClassImage], size: tuple[int, int]) -> Tensor:
    """All pictures cut to `size` (H, W), as pixels (n, 3, H, W)."""
    return torch.cat([to_pixels(resize_and_crop(example.open().convert("RGB"), size)) for example in examples])


def digest(*parts: Tensor | bytes | None) -> str:
    """One hash of tensors (as fp32) and bytes."""
    found = sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().float().cpu().contiguous().numpy().tobytes()
        found.update(part or b"")
    return found.hexdigest()


@dataclass
class ConceptDataset:
    """Batches for `MultiConceptObjective`, made while the tokens are in `model`."""

    model: StableDiffusion
    picture: ConceptPicture
    side: int
    seed: int
    examples: Sequence[ClassImage] = ()
    augment: bool = True
    swap: float = 0.5
    _places: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)
    _encoded: dict[tuple[int, bool], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    def batches(self, share: SampleShard, first: int, last: int) -> Iterator[dict[str, Any]]:
        """This process's batches of updates `first` … `last` − 1."""
        for update in range(first, last):
            for micro in range(share.accumulation):
                yield self.batch(update, share.indices(micro))

    def batch(self, update: int, indices: Sequence[int]) -> dict[str, Any]:
        """The samples `indices` of `update`, stacked along b."""
        shown_here = (len(indices) + 1) // 2 if self.examples else len(indices)
        rows = [(self.instance if n < shown_here else self.example)(update, i) for n, i in enumerate(indices)]
        tensors = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "texts"}
        return tensors | {"texts": [row["texts"] for row in rows], "size": (self.side, self.side)}

    def instance(self, update: int, index: int) -> dict[str, Any]:
        """A view of the picture, its prompt, and where the prompt says what."""
        rng, picture = generator(self.seed, "view", update, index), self.picture
        view = draw_view(self.side, rng, augment=self.augment)
        order = draw_order(len(picture.subjects), self.swap, rng)
        text = view.prefix + arranged(picture.prompt, [subject.phrase for subject in picture.subjects], order)
        pixels = shown(picture.image, view, self.side)[None]
        nouns, modifiers = self._located(text)
        row = {
            "texts": text, "instance": torch.tensor(True), "nouns": nouns, "modifiers": modifiers,
            "canvas": canvas_mask(view, self.side, self.model.factor),
            **self._noisy(self.model.posterior(pixels), update, index),
        }  # fmt: skip
        if picture.masks:
            row["masks"] = torch.cat([shown(mask, view, self.side) for mask in picture.masks])
        return self._placed(row)

    def example(self, update: int, index: int) -> dict[str, Any]:
        """A regularisation picture, mirrored or not, with its own caption."""
        rng = generator(self.seed, "regularisation", update, index)
        number = int(torch.randint(len(self.examples), (), generator=rng))
        view = draw_view(self.side, rng, augment=False)
        if (number, view.flip) not in self._encoded:
            pixels = shown(squared(self.examples[number].open().convert("RGB")), view, self.side)[None]
            self._encoded[number, view.flip] = tuple(part.cpu() for part in self.model.posterior(pixels))  # pyright: ignore
        blank = torch.zeros(len(self.picture.subjects), self.model.tokenizers[0].model_max_length)
        row = {
            "texts": self.examples[number].caption, "instance": torch.tensor(False), "nouns": blank,
            "modifiers": blank, "canvas": canvas_mask(view, self.side, self.model.factor),
            **self._noisy(self._encoded[number, view.flip], update, index),
        }  # fmt: skip
        if self.picture.masks:
            row["masks"] = torch.zeros(len(blank), self.side, self.side)
        return self._placed(row)

    def _noisy(self, posterior: tuple[Tensor, Tensor], update: int, index: int) -> dict[str, Tensor]:
        mean, std = (part[0].cpu() for part in posterior)
        rng = generator(self.seed, "noise", update, index)
        timestep = torch.randint(len(self.model.alphas_cumprod), (), generator=rng)
        noise, draw = (torch.randn(mean.shape, generator=rng) for _ in range(2))
        return {"latents": mean + std * draw, "noise": noise, "timesteps": timestep}

    def _located(self, text: str) -> tuple[Tensor, Tensor]:
        """Positions of class phrases and tokens, (s, l) each, in the subjects' order wherever they stand."""
        if text not in self._places:
            places = locate(self.model, text, self.picture.subjects)
            nouns, modifiers = torch.zeros(2, len(places), self.model.tokenizers[0].model_max_length)
            for row, place in enumerate(places):
                nouns[row, list(place.noun)] = 1
                modifiers[row, list(place.modifier)] = 1
            self._places[text] = nouns, modifiers
        return self._places[text]

    def _placed(self, row: dict[str, Any]) -> dict[str, Any]:
        return {key: part.to(self.model.device) if isinstance(part, Tensor) else part for key, part in row.items()}
