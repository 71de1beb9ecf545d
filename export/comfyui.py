"""Copy the nodes for ComfyUI, which load adapter folders, into a folder below its `custom_nodes`.

    personalize export comfyui ComfyUI/custom_nodes/personalize

They need nothing of this package.  Adapter folders belong below ComfyUI's `models/loras`; the nodes are in the menu
"personalize".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from personalize.errors import UserError
from personalize.io.plain_files import visible

NODES = Path(__file__).with_name("comfyui")


@dataclass(frozen=True)
class Config:
    output: tyro.conf.Positional[Path]
    """Folder to write, e.g. ComfyUI/custom_nodes/personalize; an older copy of the nodes there is replaced."""

    def check(self) -> None:
        """UserError if the folder holds anything else than an older copy of the nodes."""
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"{self.output} is a file: name a folder for the nodes")
        strange = {path.name for path in visible(self.output)} - {*_files(), "__pycache__"}
        if strange:
            raise UserError(f"{self.output} holds {min(strange)}, which is none of the nodes: name a folder of its own")


def main(config: Config) -> Path:
    """Copy the files and print what they are; returns the folder."""
    from personalize.io.atomic import write_folder

    folder = write_folder(config.output, _files())
    print(f"{folder}: nodes for ComfyUI; start it again and put adapter folders below its models/loras")
    return folder


def _files() -> dict[str, bytes]:
    """The nodes' files, by name."""
    return {path.name: path.read_bytes() for path in sorted(NODES.iterdir()) if path.suffix in (".py", ".json", ".md")}


if __name__ == "__main__":
    from personalize.cli.main import run_script

    raise SystemExit(run_script(Config, main))
