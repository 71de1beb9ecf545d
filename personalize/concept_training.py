"""What the multi-concept trainer does around a run: it reads the picture and subjects, and draws attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from personalize.concept_data import ConceptPicture
from personalize.concept_learning import MultiConceptRun
from personalize.concept_maps import ConceptMaps, concept_maps, map_sheet
from personalize.concepts import TOKEN, Subject
from personalize.data import find_picture
from personalize.errors import UserError
from personalize.images import load_image, to_pixels


def read_picture(config: Any) -> ConceptPicture:
    """The picture with its subjects and masks, as the trainer's options name them.

    Raises:
        UserError: no picture or two, no concept, or masks that do not fit.
    """
    given = [path for path in (config.picture, config.instance_data_dir) if path is not None]
    if len(given) != 1:
        raise UserError(f"name one picture, e.g. `multi_concept photo.jpg`; got {len(given)}")
    subjects = read_subjects(config.concepts, config.modifier_token, config.instance_prompt, config.num_vectors)
    masks = tuple(load_image(path) for path in config.masks)
    return ConceptPicture(load_image(find_picture(given[0])), subjects, config.instance_prompt or "", masks)


def read_subjects(
    concepts: Sequence[str], modifier_token: str | None, prompt: str | None, vectors: int = 1
) -> tuple[Subject, ...]:
    """Subjects from phrases "<cat1> cat", or from tokens "<cat1>+<dog1>" and the word after each in `prompt`."""
    if concepts and modifier_token:
        raise UserError("give either concepts or modifier_token, not both")
    if modifier_token is None:
        return tuple(Subject.of(phrase, vectors) for phrase in concepts)
    words = (prompt or "").split()
    subjects = []
    for token in modifier_token.split("+"):
        following = [after for word, after in zip(words, words[1:], strict=False) if word == token]
        if len(following) != 1 or TOKEN.fullmatch(following[0]):
            raise UserError(f"instance_prompt {prompt!r} must say {token} once, and after it what it is: {token} cat")
        subjects.append(Subject(token, following[0].strip(",."), vectors))
    return tuple(subjects)


class MapSnapshots:
    """Records a run's attention maps before and after training, if `enabled`, and draws them for the model card."""

    def __init__(self, run: MultiConceptRun, picture: ConceptPicture, *, enabled: bool) -> None:
        self.run, self.enabled = run, enabled
        self.image: Image.Image = picture.image.resize(run.size, Image.Resampling.LANCZOS)
        self.subjects, self.maps = picture.subjects, dict[str, ConceptMaps]()

    def record(self, name: str) -> None:
        """Record the maps as they are now under `name`; on the main process only."""
        if self.enabled and self.run.accelerator.is_main_process:
            pixels = to_pixels(self.image)
            self.maps[name] = concept_maps(self.run.model, pixels, self.run.caption, self.subjects)

    def pictures(self) -> dict[str, Image.Image]:
        """The picture as "source", and the sheet of maps as "attention" if any were recorded."""
        sheet = {"attention": map_sheet(self.image, self.subjects, self.maps)} if self.maps else {}
        return {"source": self.image, **sheet}
