"""An output folder is tried before the work, and nothing of that is left."""

import os
import resource
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest

from personalize.errors import UserError
from personalize.io.atomic import write_folder
from personalize.io.output_folder import check_output_folder, check_space


def test_an_output_folder_is_tried_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    monkeypatch.chdir(tmp_path)
    refused = {"file": "is a file", "file/x": "is a file", "/proc/nope/x": "not write .*; nothing was written$",
               "/dev/null": "is a file",
               "/dev/full/x": "is a file", "circle": "cannot be", "n" * 300: "File name too long",
               "a\0b": "cannot be a folder", "/sys": "not write .*; what was there before is unchanged$"}  # fmt: skip
    for place, says in refused.items():
        with pytest.raises(UserError, match=says):
            check_output_folder(place)
    for place in ("new", "new/deep/er", ".", "n" * 255):
        check_output_folder(place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "file"]
    (tmp_path / "old" / "kept").mkdir(parents=True)
    check_output_folder("old", ("n" * 255,))
    with pytest.raises(UserError, match="File name too long"):
        check_output_folder("old", ("n" * 256,))
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["kept"]


def test_space_is_compared_with_what_will_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path / "new", 10**6, 3 * 10**6)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 2 * 10**6, 2 * 10**6))
        check_space(tmp_path / "new", 10**6, 2 * 10**6)
        with pytest.raises(UserError, match="has 2 MB free, and 3 MB will be written"):
            check_space(tmp_path / "new", 10**6, 3 * 10**6)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_limit_on_the_size_of_files_counts(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, before[1]))
    try:
        check_space(tmp_path, 10**5, 0)
        with pytest.raises(UserError, match="File too large"):
            check_space(tmp_path, 10**6, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_mount_point_is_written_into(tmp_path: Path) -> None:
    """As in a container, where a volume is the output folder: it cannot be renamed or replaced."""
    mount = tmp_path / "volume"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        check_output_folder(mount, ("a",))
        for content in (b"1", b"2"):
            write_folder(mount, {"a": content, "deep/b": content})
        assert (mount / "a").read_bytes() == (mount / "deep" / "b").read_bytes() == b"2"
        with pytest.raises(UserError, match="No space left|has 1 MB free"):
            check_space(mount, 2 * 10**6, 0)
        with pytest.raises(UserError, match="No space left"):
            write_folder(mount, {"a": b"x" * 2 * 10**6})
        assert (mount / "a").read_bytes() == b"2" and sorted(path.name for path in mount.iterdir()) == ["a", "deep"]
    finally:
        subprocess.run(["umount", str(mount)], check=True)
