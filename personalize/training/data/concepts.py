"""Training samples of multi-concept training: views of the picture, and class pictures for regularisation.

The picture and each class picture have the shape of their own buckets (see `buckets`); a batch is of one shape.

If there are class pictures, every second sample of the run shows one: sample number update · samples + index, if that
is odd.  As in `personalize.training.data.samples`, a sample depends on the seed, its update and its index alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageChops
from torch import Tensor

from personalize.adapters.subjects import Subject, default_prompt, read_subjects
from personalize.adapters.textual_inversion import check_new_tokens, installed_tokens, locate_subjects
from personalize.errors import UserError
from personalize.io.image_files import as_rgb, image_size, load_image
from personalize.io.images import fitted_size
from personalize.io.mask_files import as_mask, check_mask, load_mask
from personalize.models.config import TEXT_ENCODERS
from personalize.models.prompts import tokenize_prompt
from personalize.models.stable_diffusion import StableDiffusion
from personalize.models.transfer import sent
from personalize.randomness import generator
from personalize.training.data.augmentation import (
    FAR,
    NEAR,
    View,
    canvas_mask,
    draw_flip,
    draw_order,
    draw_view,
    render_view,
    reorder_phrases,
)
from personalize.training.data.buckets import FittedImage, fit, fit_into
from personalize.training.data.samples import Chunk, Dataset, SampleShard
from personalize.training.data.sources import concepts_picture

EncodedImage = tuple[tuple[Tensor, Tensor], dict[str, Tensor]]  # posterior (mean, std), and `canvas` and `time_ids`


@dataclass(frozen=True)
class ConceptPicture:
    """A picture, the subjects in it, and a prompt that contains the phrase of each subject once.

    masks: for each subject a grey picture of the same size, white where it is; or none at all.
    """

    image: Image.Image
    subjects: tuple[Subject, ...]
    prompt: str = ""
    masks: tuple[Image.Image, ...] = ()

    def __post_init__(self) -> None:
        if not self.subjects:
            raise UserError("name at least one concept, e.g. --concepts '<cat1> cat'")
        if self.masks and len(self.masks) != len(self.subjects):
            raise UserError(f"{len(self.subjects)} concepts need as many masks or none, got {len(self.masks)}")
        if any(mask.size != self.image.size for mask in self.masks):
            sizes = ", ".join(f"{mask.width}×{mask.height}" for mask in self.masks)
            picture = f"{self.image.width}×{self.image.height}"
            raise UserError(f"masks are {sizes} px, the picture {picture}: make them the same size")
        masks = tuple(map(as_mask, self.masks))
        for mask, subject in zip(masks, self.subjects, strict=False):
            check_mask(mask, f"the mask of {subject.phrase}")
        object.__setattr__(self, "image", as_rgb(self.image))
        object.__setattr__(self, "masks", masks)
        object.__setattr__(self, "prompt", " ".join(self.prompt.split()) or default_prompt(self.subjects))

    @property
    def class_prompt(self) -> str:
        """The prompt without the learned tokens: "photo of a cat and a dog"."""
        text = self.prompt
        for subject in self.subjects:
            text = re.sub(rf"{re.escape(subject.token)}\s*", "", text, flags=re.IGNORECASE)
        return text

    def fitted(self, resolution: int, multiple: int) -> FittedImage:
        """The picture in its bucket of about `resolution`² px, cut at most where no subject's mask is; see `fit`."""
        anywhere = reduce(ImageChops.lighter, self.masks) if self.masks else None
        return fit(self.image, anywhere, resolution, multiple)


def check_prompt(model: StableDiffusion, picture: ConceptPicture) -> None:
    """UserError unless the subjects' tokens are new and the prompt, also with a view's prefix, names every subject."""
    check_new_tokens(model, [subject.token for subject in picture.subjects])
    widths = [encoder.config.hidden_size for encoder in model.text_encoders]
    blank = {
        subject.token: {
            encoder: torch.zeros(subject.vectors, width) for encoder, width in zip(TEXT_ENCODERS, widths, strict=False)
        }
        for subject in picture.subjects
    }
    with installed_tokens(model, blank):
        locate_subjects(model, f"a far away {picture.prompt}", picture.subjects)


@dataclass(frozen=True)
class ClassImage:
    """A class picture for regularisation, as a file or in memory, and its caption."""

    caption: str
    picture: Path | Image.Image

    def open(self) -> Image.Image:
        return load_image(self.picture) if isinstance(self.picture, Path) else self.picture

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture."""
        return image_size(self.picture) if isinstance(self.picture, Path) else self.picture.size

    def content(self) -> tuple[bytes, bytes]:
        """The caption, and the picture's file or pixels, as bytes to hash."""
        picture = self.picture.tobytes() if isinstance(self.picture, Image.Image) else self.picture.read_bytes()
        return self.caption.encode(), picture


def content_hash(*parts: Tensor | bytes | None) -> str:
    """The SHA-256 of tensors (as fp32) and bytes, one after the other."""
    hasher = sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().float().cpu().contiguous().numpy().tobytes()
        hasher.update(part or b"")
    return hasher.hexdigest()


@dataclass
class ConceptDataset(Dataset):
    """Training batches for `MultiConceptObjective`; the subjects' tokens must be in `model` while they are made.

    side: of a square picture in pixels; pictures of other shapes have about as many pixels.
    augment: show the picture also shrunk and zoomed in (see `augmentation`).
    swap: probability that a prompt names the subjects in another order.
    random_flip: mirror every second sample.
    """

    model: StableDiffusion
    picture: ConceptPicture
    side: int
    seed: int
    class_images: Sequence[ClassImage] = ()
    augment: bool = True
    swap: float = 0.5
    random_flip: bool = False
    _positions: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)
    _encoded: dict[tuple[int, bool], EncodedImage] = field(default_factory=dict, init=False)

    @cached_property
    def fitted(self) -> FittedImage:
        """The picture in its bucket."""
        return self.picture.fitted(self.side, 8 * self.model.factor)

    @cached_property
    def class_sizes(self) -> list[tuple[int, int]]:
        """The bucket (H, W) of each class picture."""
        sizes = [image.size for image in self.class_images]
        multiple = 8 * self.model.factor
        buckets = {(w, h): fitted_size(h, w, self.side, multiple) for w, h in dict.fromkeys(sizes)}
        return [buckets[size] for size in sizes]

    @cached_property
    def text_lengths(self) -> tuple[int, int]:
        """The text positions of the longest prompt, and of the longest caption of a class picture, in chunks of 77."""
        prompts = [prefix + self.picture.prompt for prefix in (*(FAR + NEAR if self.augment else ()), "")]
        captions = [image.caption for image in self.class_images] or prompts
        chunk = self.model.tokenizers[0].model_max_length
        kept = max(subject.vectors for subject in self.picture.subjects)  # in one chunk, all but one may be left unused
        most = (max(len(tokenize_prompt(self.model, text).ids) - 2 for text in {*some}) for some in (prompts, captions))
        own, prior = (chunk * (1 if n <= chunk - 2 else math.ceil(n / max(1, chunk - 1 - kept))) for n in most)
        return own, prior

    @cached_property
    def text_length(self) -> int:
        """The text positions l of every sample: both of `text_lengths` repeated, see `of_one_length`."""
        return math.lcm(*self.text_lengths)

    def updates(self, shard: SampleShard, first: int, last: int) -> Iterator[list[dict[str, Any]]]:
        """This process's batches of each of the updates `first` … `last` − 1."""
        for update in range(first, last):
            chunks = shard.chunks([self._size(update, index, shard.samples) for index in range(shard.samples)])
            yield [self.batch(update, chunk, shard, len(chunks)) for chunk in chunks]

    def batch(self, update: int, chunk: Chunk, shard: SampleShard, count: int) -> dict[str, Any]:
        """The samples of `chunk`, all of one size, stacked along b; the update has `count` batches in every process."""
        instances = [self.shows_picture(update, index, shard.samples) for index in range(shard.samples)]
        rows = [(self.instance if instances[index] else self.class_image)(update, index) for index in chunk.indices]
        tensors = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "texts"}
        instance = tensors.pop("instance")  # stays on the CPU, where it is decided which losses are computed
        tensors["share"] = torch.full((len(rows),), chunk.share)
        samples = max(1, sum(instances))
        tensors["instance_share"] = instance * (count * shard.processes / samples if chunk.share else 0.0)
        kept = {"texts": [row["texts"] for row in rows], "text_lengths": self.text_lengths, "instance": instance}
        tensors = {key: sent(part, self.model.device) for key, part in tensors.items()}
        mean, std, draw = (tensors.pop(key) for key in ("mean", "std", "draw"))
        return tensors | kept | {"latents": mean + std * draw}

    def shows_picture(self, update: int, index: int, samples: int) -> bool:
        """Does this sample show the picture, and not a class picture?  It depends on the sample's number in the run."""
        return not self.class_images or (update * samples + index) % 2 == 0

    def _size(self, update: int, index: int, samples: int) -> tuple[int, int]:
        """The size (H, W) of a sample."""
        if self.shows_picture(update, index, samples):
            return self.fitted.size
        return self.class_sizes[self._class_number(update, index)[0]]

    def _class_number(self, update: int, index: int) -> tuple[int, torch.Generator]:
        """The number of the class picture that a sample shows, and the generator that goes on from there."""
        rng = generator(self.seed, "regularisation", update, index)
        return int(torch.randint(len(self.class_images), (), generator=rng)), rng

    def instance(self, update: int, index: int) -> dict[str, Any]:
        """A sample that shows the picture: a view of it, its prompt, and where the prompt names the subjects."""
        rng, picture, fitted = generator(self.seed, "view", update, index), self.picture, self.fitted
        view = draw_view(fitted, rng, augment=self.augment, random_flip=self.random_flip)
        order = draw_order(len(picture.subjects), self.swap, rng)
        text = view.prefix + reorder_phrases(picture.prompt, [subject.phrase for subject in picture.subjects], order)
        pixels = render_view(picture.image, view, fitted)[None]
        nouns, modifiers = self._token_positions(text)
        row = {
            "texts": text, "instance": torch.tensor(True), "nouns": nouns, "modifiers": modifiers,
            **self._shape(view, fitted),
            **self._noise_sample(self.model.posterior(sent(pixels, self.model.device)), update, index),
        }  # fmt: skip
        if picture.masks:
            row["masks"] = torch.cat([render_view(mask, view, fitted) for mask in picture.masks])
        return row

    def class_image(self, update: int, index: int) -> dict[str, Any]:
        """A sample that shows a class picture, whole, with its own caption."""
        number, rng = self._class_number(update, index)
        flip = draw_flip(rng) and self.random_flip
        if (number, flip) not in self._encoded:
            self._encoded[number, flip] = self._encoded_class_image(number, flip)
        posterior, shape = self._encoded[number, flip]
        blank = torch.zeros(len(self.picture.subjects), self.text_length)
        row = {
            "texts": self.class_images[number].caption, "instance": torch.tensor(False), "nouns": blank,
            "modifiers": blank, **shape, **self._noise_sample(posterior, update, index),
        }  # fmt: skip
        if self.picture.masks:
            row["masks"] = torch.zeros(len(blank), *self.class_sizes[number])
        return row

    def _encoded_class_image(self, number: int, flip: bool) -> EncodedImage:
        """The posterior (mean, std) of a class picture in its bucket, and what a sample says of its shape."""
        image = as_rgb(self.class_images[number].open())
        fitted = fit_into(self.class_sizes[number], image)
        view = View(fitted.unpadded_size, flip=flip)
        return self.model.posterior(render_view(image, view, fitted)[None]), self._shape(view, fitted)

    def _shape(self, view: View, fitted: FittedImage) -> dict[str, Tensor]:
        """`canvas` (1, h, w), see `canvas_mask`, and on SDXL `time_ids` (6), the size conditioning."""
        sizes = {"time_ids": torch.tensor(view.time_ids(fitted))} if self.model.family == "sdxl" else {}
        return {"canvas": canvas_mask(view, fitted, self.model.factor), **sizes}

    def _noise_sample(self, posterior: tuple[Tensor, Tensor], update: int, index: int) -> dict[str, Tensor]:
        """The `posterior` (mean, std), with a `draw` from it, noise and a timestep, which are on the CPU."""
        mean, std = (part[0] for part in posterior)
        rng = generator(self.seed, "noise", update, index)
        timestep = torch.randint(len(self.model.alphas_cumprod), (), generator=rng)
        noise, draw = (torch.randn(mean.shape, generator=rng) for _ in range(2))
        return {"mean": mean, "std": std, "draw": draw, "noise": noise, "timesteps": timestep}

    def _token_positions(self, text: str) -> tuple[Tensor, Tensor]:
        """The text positions of class phrases and of tokens, two (s, l) in {0, 1}, in the order of the subjects."""
        if text not in self._positions:
            places = locate_subjects(self.model, text, self.picture.subjects)
            nouns, modifiers = torch.zeros(2, len(places), self.text_length)
            for row, place in enumerate(places):
                nouns[row, list(place.noun)] = 1
                modifiers[row, list(place.modifier)] = 1
            self._positions[text] = nouns, modifiers
        return self._positions[text]


def read_picture(config: Any) -> ConceptPicture:
    """The picture with its subjects and masks, as the trainer's options name them.

    Raises:
        UserError: no picture or two, no concept, or masks that do not fit.
    """
    picture = load_image(concepts_picture(config))
    subjects = read_subjects(config.concepts, config.modifier_token, config.instance_prompt, config.num_vectors)
    masks = tuple(load_mask(path) for path in config.masks)
    return ConceptPicture(picture, subjects, config.instance_prompt or "", masks)
