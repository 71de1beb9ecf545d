"""Pictures as browsers show them: as they are read here, where a browser would show them otherwise or not at all."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from PIL import ExifTags

from personalize.errors import UserError
from personalize.io.image_files import DAMAGED, header, load_image

TURNED = {"JPEG", "MPO", "GIF", "BMP"}  # pictures that every browser shows, turned as their EXIF says
SHOWN = {"PNG", "WEBP", "AVIF"}  # those that every browser shows, but not every one turns


def png_for_browsers(path: Path) -> bytes | None:
    """A picture as a PNG file, if browsers do not show it (TIFF, HEIC) or do not turn it as its EXIF says (WebP).

    None if they show it upright, so that points set on it are places of the picture that is edited; and for no picture.
    """
    try:
        with header(path) as picture:
            kind, turned = picture.format, picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
        if kind in TURNED or kind in SHOWN and not turned:
            return None
        buffer = BytesIO()
        load_image(path).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    except (UserError, *DAMAGED):
        return None
