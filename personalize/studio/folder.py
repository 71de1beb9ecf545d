"""The folder that the studio was started in: the only place where it reads and writes.

A path that a page names is relative to this folder, and leads to a file in it: none that is absolute, has `..` in it,
or passes a symbolic link.
"""

from __future__ import annotations

import os
import re
import shutil
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import count
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Lock

from personalize.errors import UserError
from personalize.formats.adapter_folders import ADAPTER_SUFFIXES, MANIFEST
from personalize.io.atomic import as_user_error, write_file
from personalize.io.image_files import check_image, read_image
from personalize.io.image_metadata import IMAGE_SUFFIXES
from personalize.io.json_files import SURROGATE

OUTPUT = "studio"  # folder of all that the studio writes
UPLOADS = ".uploads"  # in it: what a browser has sent, until it is used
DEEPEST = 4  # folders below the start in which files are looked for


class Folder:
    """The start folder.  It is the working directory too, so that the commands shown can be typed where it is."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.uploads = self.root / OUTPUT / UPLOADS
        self._keeping = Lock()  # two pages may send files of one name at the same time

    def inside(self, text: str | Path) -> Path:
        """The relative path that `text` names.  UserError if it leads out of the folder; the file need not exist."""
        text = str(text).strip()
        parts = PurePosixPath(text.replace("\\", "/")).parts
        absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).drive or text.startswith(("~", "\\", "-"))
        if not text or "\0" in text or absolute or ".." in parts:
            raise UserError(
                f"{text!r} is outside the folder of the studio: give a path in it, such as pictures/cat.png"
            )
        path = Path(*parts)
        for step in (path, *path.parents):
            if (self.root / step).is_symlink():
                raise UserError(
                    f"{text!r} passes a symbolic link, {step}: the studio follows none, copy the file instead"
                )
        return path

    def existing(self, text: str | Path) -> Path:
        """`inside`, of something that exists."""
        path = self.inside(text)
        if not (self.root / path).exists():
            raise UserError(f"there is no {path} in the folder of the studio: choose one of the list")
        return path

    def picture(self, text: str | Path) -> Path:
        """`existing`, of a picture that can be read."""
        path = self.existing(text)
        check_image(self.root / path)
        return path

    def keep_upload(self, sent: str, into: str = "pictures") -> Path:
        """The relative path of a file that the browser has sent, moved to its place under its own name.

        Raises:
            UserError: it is not one that was sent; of `pictures`: it is none that can be read.
        """
        path = Path(sent).resolve()
        if not path.is_relative_to(self.uploads.resolve()) or not path.is_file():
            raise UserError("this file was not sent by the page: drop it again")
        name = re.sub(r"[^\w.-]+", "_", path.name).lstrip(".-") or "file"
        if into == "pictures":
            try:
                check_image(path)
            except UserError as error:
                raise UserError(str(error).replace(str(path), path.name)) from None
        target = self.root / OUTPUT / into / name
        with self._keeping, as_user_error(target.parent):
            for number in count(2):
                if not target.exists() or target.read_bytes() == path.read_bytes():
                    break
                target = target.with_name(f"{Path(name).stem}-{number}{Path(name).suffix}")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copyfile(path, target)
        return target.relative_to(self.root)

    def keep_mask(self, data_url: str, name: str = "mask") -> Path:
        """The relative path of a mask that was painted, a PNG file as a data URL."""
        head, _, body = data_url.partition(",")
        if head != "data:image/png;base64" or len(body) > 100_000_000:
            raise UserError("the mask is no PNG picture: paint it again")
        content = b64decode(body)
        read_image(BytesIO(content), "the mask")
        path = self.new_folder("masks") / f"{name}.png"
        write_file(self.root / path, content)
        return path

    def new_folder(self, name: str) -> Path:
        """The relative path of a new empty folder, studio/NAME-001, …: it is made, so that no other job gets it too."""
        with as_user_error(Path(OUTPUT)):
            (self.root / OUTPUT).mkdir(exist_ok=True)
            for number in count(1):
                path = Path(OUTPUT, f"{name}-{number:03d}")
                with suppress(FileExistsError):
                    (self.root / path).mkdir()
                    return path
        raise AssertionError("count() does not end")

    @contextmanager
    def folder_for(self, name: str) -> Iterator[Path]:
        """`new_folder` for what the body describes; it is removed again if the body raises."""
        path = self.new_folder(name)
        try:
            yield path
        except BaseException:
            with suppress(OSError):
                (self.root / path).rmdir()
            raise

    def pictures(self) -> list[str]:
        """The pictures in the folder, those of the user first, the newest first."""
        found = [path for path in self._files() if path.suffix.lower() in IMAGE_SUFFIXES]
        return [str(path) for path in sorted(found, key=lambda path: (path.parts[0] == OUTPUT, -self._changed(path)))]

    def adapters(self) -> list[str]:
        """The adapter folders in the folder, the newest first."""
        found = [path.parent for path in self._files() if path.name == MANIFEST and path.parent != Path(".")]
        return [str(path) for path in sorted(found, key=lambda path: -self._changed(path))]

    def adapter_files(self) -> list[str]:
        """Adapter folders, and files that may hold an adapter."""
        folders = self.adapters()
        files = (path for path in self._files() if path.suffix.lower() in ADAPTER_SUFFIXES)
        found = [path for path in files if str(path.parent) not in folders]
        return folders + [str(path) for path in sorted(found, key=lambda path: -self._changed(path))]

    def bases(self) -> list[str]:
        """The base models in the folder: diffusers' folders."""
        return sorted(str(path.parent) for path in self._files() if path.name == "model_index.json")

    def _files(self) -> Iterator[Path]:
        """Every file, relative; nothing hidden, nothing that `inside` would refuse, no name that a page cannot hold."""
        for place, folders, names in os.walk(self.root):
            relative = Path(place).relative_to(self.root)
            folders[:], names = ([one for one in found if not SURROGATE.search(one)] for found in (folders, names))
            kept = [one for one in folders if not one.startswith((".", "checkpoint-")) and one != "node_modules"]
            folders[:] = (
                [] if len(relative.parts) >= DEEPEST else [one for one in kept if not Path(place, one).is_symlink()]
            )
            yield from (relative / name for name in names if name[0] != "." and not Path(place, name).is_symlink())

    def _changed(self, path: Path) -> float:
        return (self.root / path).stat().st_mtime
