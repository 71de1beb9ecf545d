"""Which picture files a trainer's options name, and what is left out of a folder; read before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from personalize.errors import UserError
from personalize.io.image_files import check_image_path
from personalize.io.image_folders import FolderImage, ImageFolder, read_folder
from personalize.io.image_metadata import caption_file

IMAGE_COLUMN = "image"  # the default of --image_column


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


def instance_folders(places: list[Path], *, captioned: bool) -> list[ImageFolder]:
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
