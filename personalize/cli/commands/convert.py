"""TODO: cli/commands/convert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from personalize.errors import UserError
from personalize.formats import lora_files as formats
from personalize.formats import textual_inversion_files as token_files
from personalize.formats.conversion import DTYPES, _convert_embedding, _write_peft, factors, metadata, require
from personalize.formats.foreign_files import read_foreign_file
from personalize.formats.peft_files import peft_files
from personalize.io.atomic import write_file
from personalize.io.pickles import read_any

if TYPE_CHECKING:
    from personalize.cli.options import ConvertConfig


def run(config: ConvertConfig) -> Path:
    """`personalize convert`: read a file, write it in another layout, and verify the result before it gets its name.

    Raises:
        UserError: nothing that can be converted, no disk space, or a result that does not verify; nothing is written.
    """
    if config.output.exists() and config.output.samefile(config.file):
        raise UserError(f"{config.output} is the file to convert: name another --output")
    content = read_any(config.file, allow_pickle=config.allow_pickle)
    lora = read_foreign_file(config.file, content, config.token)
    if isinstance(lora, token_files.LearnedToken):
        return _convert_embedding(config, lora)
    state = {key: tensor for key, tensor in lora.state.items() if key.startswith("unet.") or not config.unet_only}
    if not state:
        raise UserError(f"{config.file} has no UNet part: leave --unet_only out")
    family, dtype = config.family or lora.family, DTYPES[config.dtype]
    expected = factors(state, lora.alpha / lora.rank)
    if config.to == "peft":
        written = _write_peft(
            config.output, peft_files(state, lora.alpha, dtype, lora.base.get("name")), expected, family
        )
    elif config.to == "diffusers":
        data = formats.diffusers_file(state, lora.alpha, dtype=dtype)
        written = write_file(config.output, data, check=lambda path: require(path, expected, family, kohya=False))
    else:
        if family is None:
            raise UserError(f"{config.file} does not tell the family of its base: say --family sd1, sd2 or sdxl")
        header = metadata(lora, family, config.output.stem)
        data = formats.kohya_file(state, lora.alpha, family=family, dtype=dtype, metadata=header)
        written = write_file(config.output, data, check=lambda path: require(path, expected, family, kohya=True))
    print(f"{written}: {len(expected)} modules, rank {lora.rank}, verified")
    return written
