"""What is found wrong with a file, as a value; and the findings on the names of a UNet's blocks in files of kohya's.

    original code    lora_unet_input_blocks_1_1_…    of SDXL all know them, of SD 1.x and 2.x graphical programs alone
    diffusers        lora_unet_down_blocks_0_…       of SD 1.x and 2.x all know them, of SDXL not all

What diffusers drops was read in its converter and is tested.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from personalize.formats.layouts import FileContents

YES, UNKNOWN, PARTLY, NO = "yes", "unknown", "partly", "no"
IN_BLOCKS = {  # by whose names they are: how the key of a module in a block begins
    "original": re.compile(r"lora_unet_(input_blocks_(?!0_0)|middle_block|output_blocks)"),
    "diffusers": re.compile(r"lora_unet_(down_blocks|mid_block|up_blocks)"),
}
OUTSIDE = re.compile(r"lora_unet_(add_embedding|time_embedding|conv_)")  # diffusers' names of what is in no block
ADD_EMBEDDING = "lora_unet_add_embedding"


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file: a sentence, and the verdict on every program that it affects."""

    text: str
    programs: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    """The modules that those programs drop, if it is about modules."""


def block_names(contents: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    """UNet modules in kohya's names whose blocks a program knows by other names."""
    stems = {m: stem for m, stem in contents.key_stems.items() if stem.startswith("lora_unet_")}
    named = {
        names: tuple(m for m, stem in stems.items() if pattern.match(stem)) for names, pattern in IN_BLOCKS.items()
    }
    return _in_sdxl(stems, named) if family == "sdxl" else _in_sd(stems, named)


def _in_sd(stems: Mapping[str, str], named: Mapping[str, tuple[str, ...]]) -> list[Finding]:
    """In SD 1.x and 2.x: the original code's names, which diffusers does not translate for them."""
    if not (original := named["original"]):
        return []
    text = f"{len(original)} UNet module(s) have the original code's block names, which diffusers knows of SDXL alone"
    verdict = NO if len(original) == len(stems) else PARTLY
    programs = {"diffusers": verdict, "sd-scripts": verdict, "InvokeAI": UNKNOWN}
    return [Finding(f"{text}; convert --to kohya renames them", programs, original)]


def _in_sdxl(stems: Mapping[str, str], named: Mapping[str, tuple[str, ...]]) -> list[Finding]:
    """In SDXL: diffusers' names, which not all programs know, and both in one file, of which diffusers drops one."""
    ours = (*named["diffusers"], *(m for m, stem in stems.items() if OUTSIDE.match(stem)))
    found = []
    if ours:
        text = f"{len(ours)} SDXL module(s) have diffusers' block names, which tools that know the original ones reject"
        programs = {"sd-scripts": NO, "InvokeAI": PARTLY}
        found.append(Finding(f"{text}; convert --to kohya renames them", programs, ours))
    lost = tuple(m for m, stem in stems.items() if stem.startswith(ADD_EMBEDDING))
    lost += named["original"] if named["diffusers"] else ()
    if lost:
        text = (
            f"{len(lost)} SDXL module(s) are dropped by diffusers, silently: add_embedding in its own names, and blocks"
        )
        text = f"{text} in the original ones where a file has both; convert --to kohya renames them"
        found.append(Finding(text, {"diffusers": PARTLY}, lost))
    return found
