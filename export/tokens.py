"""Export learned tokens (textual inversion) as files for the graphical programs and for diffusers.

    personalize export tokens my-concepts --output embeddings
    personalize export tokens some_embedding.safetensors --layout diffusers --token "<style>" --output embeddings

In graphical programs the file's name is the word to write in a prompt (in ComfyUI `embedding:name`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from personalize.errors import UserError

if TYPE_CHECKING:
    from personalize.formats.textual_inversion_files import Rows


@dataclass(frozen=True)
class Config:
    source: tyro.conf.Positional[Path]
    """Adapter folder with learned tokens, or a file (.safetensors) of any program that holds some."""
    output: Path
    """Folder to write; must not exist yet."""
    layout: Literal["both", "ui", "diffusers"] = "both"
    """ui: TOKEN.safetensors for A1111, Forge, ComfyUI, InvokeAI; diffusers: learned_embeds.safetensors; or both."""
    token: str | None = None
    """Another word for the token, if there is only one."""
    family: Literal["sd1", "sd2", "sdxl"] | None = None
    """Family of the base model, for files that do not tell it."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the numbers in the files."""

    def check(self) -> None:
        from personalize.cli.checks import check_adapters
        from personalize.io.output_folder import require_absent

        check_adapters([self.source])
        require_absent(self.output)


def main(config: Config) -> Path:
    """Write the files and print what they contain; returns the folder."""
    from personalize.adapters.export import DTYPES
    from personalize.formats.textual_inversion_files import require_token_files, token_file_contents, token_file_names
    from personalize.io.atomic import write_folder
    from personalize.io.output_folder import require_absent

    concepts, family = read(config)
    layout, dtype = config.layout, DTYPES[config.dtype]
    files = token_file_contents(concepts, layout=layout, family=family, dtype=dtype)
    output = require_absent(config.output)
    write_folder(output, files, check=lambda folder: require_token_files(folder, concepts, layout, dtype))
    for name, (token, encoder) in token_file_names(concepts, layout).items():
        count = max(len(rows) for rows in concepts[token].values())
        print(f"{config.output / name}: {token}, {count} vector(s), {encoder or 'for graphical programs'}, verified")
    return config.output


def read(config: Config) -> tuple[dict[str, Rows], str | None]:
    """The learned tokens with their embedding rows, and the base model's family if it is known."""
    from personalize.adapters.adapter import Adapter
    from personalize.formats.adapter_folders import MANIFEST
    from personalize.formats.foreign_files import read_adapter_file

    if (config.source / MANIFEST).is_file():
        adapter = Adapter.load(config.source)
        concepts, family = dict(adapter.concepts), adapter.known_family
    else:
        file = read_adapter_file(config.source, token=config.token, family=config.family)
        concepts, family = dict(file.concepts), file.family
    if not concepts:
        raise UserError(f"{config.source} has no learned tokens: only trainers of concepts make them")
    if config.token is not None and len(concepts) > 1:
        raise UserError(f"{config.source} has {len(concepts)} tokens: --token renames a single one")
    return {config.token or token: rows for token, rows in concepts.items()}, family


if __name__ == "__main__":
    from personalize.cli.main import run_script

    raise SystemExit(run_script(Config, main))
