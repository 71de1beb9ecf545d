"""Which picture files a trainer's options name, with their masks and captions; read before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from personalize.errors import UserError
from personalize.io.image_files import check_image_path
from personalize.io.image_folders import FolderImage, ImageFolder, only_picture, read_folder
from personalize.io.image_metadata import IMAGE_SUFFIXES, caption_file

IMAGE_COLUMN, CAPTION_COLUMN = "image", "text"  # the defaults of --image_column and --caption_column
MASK_FILE = "mask_file_name"  # the column of masks in a folder's metadata


def instance_places(config: Any) -> list[Path]:
    """The files and folders that show the subject; none if the options name a data set instead.

    Raises:
        UserError: nothing is named, or more than one of picture, instance_image, instance_data_dir and dataset_name.
    """
    pictures = [list(config.picture), *([path] for path in (config.instance_image, config.instance_data_dir) if path)]
    given = [paths for paths in pictures if paths]
    count = len(given) + (config.dataset_name is not None)
    if count != 1:
        names = "picture, --instance_image, --instance_data_dir and --dataset_name"
        what = "none" if count == 0 else f"{count}"
        raise UserError(f"name the pictures in one way, e.g. `single_image photo.jpg`; got {what} of {names}")
    if given and config.class_dataset_name is None and config.image_column != IMAGE_COLUMN:
        raise UserError(
            f"image_column {config.image_column} is for data sets, a folder's pictures are its files: leave it out"
        )
    return given[0] if given else []


def concepts_picture(config: Any) -> Path:
    """The file of the one picture that shows all concepts; UserError if the options name none or several."""
    given = [path for path in (config.picture, config.instance_data_dir) if path is not None]
    if len(given) != 1:
        raise UserError(f"name one picture, e.g. `multi_concept photo.jpg`; got {len(given)}")
    return only_picture(given[0])


def named_pictures(
    places: Sequence[Path], config: Any, masks: Sequence[Path] = (), captions: Sequence[str] = ()
) -> list[FolderImage]:
    """The pictures at `places` (files and folders), each with the files and words that belong to it.

    Args:
        config: has caption, for pictures without one of their own (but of a single file it is the caption),
            caption_model and caption_column.
        masks: one for each picture, or one folder of masks; see `with_masks`.
        captions: one for each picture, which takes the place of its own.

    Raises:
        UserError: a place that cannot be read, or other numbers of masks or captions than of pictures.
    """
    captioned = bool(captions) or config.caption is not None or config.caption_model is not None
    found = [image for folder in instance_folders(places, captioned=captioned) for image in folder.images]
    images = with_masks(found, masks) if masks else found
    if config.caption is not None and [image.path for image in images] == list(places[:1]) == list(places):
        captions = [config.caption]
    if captions and len(captions) != len(images):
        names = ", ".join(image.path.name for image in images)
        raise UserError(f"{len(captions)} captions for {len(images)} pictures ({names}): give one, or one for each")
    words = [{config.caption_column: text} for text in captions] or [{}] * len(images)
    return [replace(image, columns={**image.columns, **own}) for image, own in zip(images, words, strict=True)]


def with_masks(images: Sequence[FolderImage], masks: Sequence[Path]) -> list[FolderImage]:
    """`images` with a mask for each: as many files in their order, or one folder.

    A folder of masks has for each picture a mask of its name, e.g. `1.png` for `1.jpg`.  The masks themselves are no
    pictures to learn, if they lie among these.

    Raises:
        UserError: a picture without a mask, a mask without a picture, or one mask for pictures in different folders.
    """
    folder = masks[0] if len(masks) == 1 and masks[0].is_dir() else None
    if folder is not None:
        images = [image for image in images if not _place(image.path).is_relative_to(_place(folder / "any").parent)]
        if not images:
            raise UserError(f"{folder} holds the pictures themselves: name a folder that holds their masks alone")
        found = [_mask_of(image.path, folder) for image in images]
        _check_owners(images, found)
    else:
        if len(masks) > 1:
            images = [image for image in images if _place(image.path) not in map(_place, masks)]
        if len(masks) != len(images):
            count = f"{len(masks)} mask{'s' * (len(masks) > 1)}, {len(images)} pictures"
            raise UserError(f"a mask belongs to one picture ({count}): name one for each, or a folder of masks")
        found = masks
    pairs = zip(images, found, strict=True)
    return [replace(image, files={**image.files, MASK_FILE: mask}) for image, mask in pairs]


def _place(path: Path) -> Path:
    """`path` however it is spelled: with its folder's own path, but a link to a file as it is."""
    return path.parent.resolve() / path.name


def _mask_of(picture: Path, folder: Path) -> Path:
    """The picture in `folder` that has the name of `picture`, whatever its suffix."""
    found = [path for path in folder.iterdir() if path.stem == picture.stem and path.suffix.lower() in IMAGE_SUFFIXES]
    if len(found) != 1:
        what = "no mask" if not found else f"{len(found)} masks"
        raise UserError(f"{folder} holds {what} of {picture.name}: give each picture one, here {picture.stem}.png")
    return found[0]


def _check_owners(images: Sequence[FolderImage], masks: Sequence[Path]) -> None:
    """UserError if one of the `masks` belongs by its name to pictures in different folders."""
    owners: dict[Path, Path] = {}
    for image, mask in zip(images, masks, strict=True):
        first = owners.setdefault(mask, image.path)
        if _place(first).parent != _place(image.path).parent:
            raise UserError(f"{mask} is by its name the mask of {first} and of {image.path}: rename one picture, and "
                            "give it a mask of its own")  # fmt: skip


def instance_folders(places: Sequence[Path], *, captioned: bool) -> list[ImageFolder]:
    """Each folder among `places` with its pictures, and each file as a folder of one.

    In a folder with metadata, pictures in no row and without a caption beside them are left out, unless the options
    have a caption for all of them (`captioned`).

    Raises:
        UserError: no such file or folder, or a folder that cannot be read (see `read_folder`).
    """
    return [_as_folder(place) if captioned else _described(_as_folder(place)) for place in places]


def _as_folder(place: Path) -> ImageFolder:
    if not place.exists():
        raise UserError(f"{place}: no such file or folder; check the path of the picture")
    if place.is_dir():
        return read_folder(place)
    return ImageFolder(place, (FolderImage(check_image_path(place)),), {})


def _described(folder: ImageFolder) -> ImageFolder:
    """`folder` without pictures that its metadata does not name, if they have no caption of their own either."""
    if not any(image.where for image in folder.images):
        return folder
    kept = tuple(image for image in folder.images if image.where or caption_file(image.path))
    names = tuple(str(image.path.relative_to(folder.path)) for image in folder.images if image not in kept)
    left_out = {"in no row of the metadata, and without a caption": names} if names else {}
    return ImageFolder(folder.path, kept, {**folder.left_out, **left_out})
