"""Where the picture is."""

from pathlib import Path

import pytest

from personalize.data import find_picture
from personalize.errors import UserError


def test_file_or_folder_with_one_picture(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        find_picture(tmp_path / "missing.png")
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match="found 0"):
        find_picture(tmp_path)
    (tmp_path / "a.PNG").touch()
    assert find_picture(tmp_path) == find_picture(tmp_path / "a.PNG") == tmp_path / "a.PNG"
    (tmp_path / "b.webp").touch()
    with pytest.raises(UserError, match=r"found 2 \(a.PNG, b.webp\)"):
        find_picture(tmp_path)
