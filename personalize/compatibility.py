"""Compatibility: what is wrong with an adapter file, and which program reads it, with the reason.

Each finding says what it does to which program; a program's verdict is its worst.  The facts are those of diffusers
0.42, peft 0.21 and of the programs' key maps as read in 2025 and 2026; verdicts on diffusers are tested here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from personalize.layouts import FileContents

YES, PARTLY, NO = "yes", "partly", "no"
UIS = ("A1111", "Forge", "ComfyUI", "InvokeAI")
PROGRAMS = ("personalize", "diffusers", *UIS, "sd-scripts")
OTHERS = (*UIS, "sd-scripts")
PATH_MAPS = "knows modules by kohya's names: convert --to kohya"
SOME_LAYOUTS = {"InvokeAI": (PARTLY, "reads these names only in some layouts")}
PLAIN = {"LoRA", "Tucker LoCon"}
SPELLINGS = {  # programs that do not read a spelling: verdict and reason; any other program does
    "kohya": {},
    "PEFT": {name: (NO, PATH_MAPS) for name in OTHERS} | SOME_LAYOUTS,
    "diffusers": {name: (NO, PATH_MAPS) for name in OTHERS} | SOME_LAYOUTS,
    "old diffusers": {"sd-scripts": (NO, PATH_MAPS)}
    | {name: (PARTLY, "support for the old processor names comes and goes") for name in ("A1111", "Forge")},
    "ComfyUI": {name: (NO, "does not know ComfyUI's names: convert the file") for name in PROGRAMS[1:]}
    | {"ComfyUI": (YES, ""), "Forge": (YES, "")},
    "PEFT folder": {name: (NO, "PEFT's own layout, which only PEFT loads: convert the file") for name in PROGRAMS[1:]},
    "no prefix": {name: (NO, "loads nothing: the names lack their 'unet.'; convert the file") for name in PROGRAMS[1:]},
}  # fmt: skip
ALGORITHMS = {
    "DoRA": {"diffusers": (NO, "drops kohya's dora_scale with a warning"), "sd-scripts": (PARTLY, "needs LyCORIS")},
    "LoHa": {"diffusers": (NO, "raises: no LoHa for Stable Diffusion"), "sd-scripts": (PARTLY, "needs LyCORIS")},
    "LoKr": {"diffusers": (NO, "raises: no LoKr for Stable Diffusion"), "sd-scripts": (PARTLY, "needs LyCORIS")},
    "Custom Diffusion": {name: (NO, "knows no Custom Diffusion") for name in OTHERS}
    | {"diffusers": (PARTLY, "only with a private argument; a plain load does nothing and says nothing")},
}  # fmt: skip
ALGORITHMS["LyCORIS"] = ALGORITHMS["LoHa"] | {"diffusers": (NO, "knows plain LoRA only")}
FORMS = {
    "checkpoint": {name: (NO, "a whole model, no adapter") for name in PROGRAMS},
    "flat list of cloneofsimo/lora": {name: (NO, "nothing current reads this layout") for name in PROGRAMS},
    "source embedding of personalize": {name: (NO, "goes with an adapter folder") for name in PROGRAMS[1:]},
    "bundle": {
        "diffusers": (NO, "raises: embeddings cannot travel inside a LoRA"),
        "Forge": (PARTLY, "ignores the embeddings"), "InvokeAI": (PARTLY, "some versions raise"),
        "ComfyUI": (PARTLY, "embeddings only when chosen as one"),
        "sd-scripts": (PARTLY, "ignores the embeddings"),
    },
    "textual inversion, diffusers form": {"ComfyUI": (YES, ""), "sd-scripts": (PARTLY, "takes a file of one tensor")},
    "textual inversion, A1111 form": {"diffusers": (PARTLY, "the token becomes 'emb_params' unless token= is given")},
    "textual inversion, A1111 pickle": {"InvokeAI": (PARTLY, "may refuse pickles")},
    "textual inversion, SDXL form": {"diffusers": (NO, "raises: each tensor must be passed to its own encoder")},
    "textual inversion, OneTrainer form": {"diffusers": (PARTLY, "give token=, or it takes the key for the token")},
    "textual inversion, cog-sdxl form": {name: (NO, "only cog-sdxl reads it") for name in PROGRAMS[1:]},
}  # fmt: skip
TRIGGER = "the trigger is the file's name"


@dataclass(frozen=True)
class Finding:
    """Something wrong with a file, and the verdict on each program it concerns."""

    text: str
    programs: Mapping[str, str] = field(default_factory=dict)


def readers(found: FileContents, findings: list[Finding]) -> dict[str, tuple[str, str]]:
    """Program → ("yes" | "partly" | "no", reason)."""
    return {program: _verdict(program, found, findings) for program in PROGRAMS}


def _verdict(program: str, found: FileContents, findings: list[Finding]) -> tuple[str, str]:
    if not found.modules and not found.file_kind:
        return NO, "nothing known is in it"
    tables = [SPELLINGS[spelling] for spelling in found.naming_schemes]
    tables += [ALGORITHMS.get(kind, ALGORITHMS["LyCORIS"]) for kind in set(found.algorithm_counts) - PLAIN]
    tables += [FORMS[found.file_kind]] if found.file_kind in FORMS else []
    reasons = [table[program] for table in tables if program in table]
    reasons += [(finding.programs[program], finding.text) for finding in findings if program in finding.programs]
    if program == "personalize" and set(found.algorithm_counts) - PLAIN:
        reasons.append((NO, "reads and converts plain LoRA only"))
    worst = max(reasons, key=lambda reason: (YES, PARTLY, NO).index(reason[0]), default=(YES, ""))
    embedding = found.file_kind.startswith("textual inversion") and program in UIS
    return (YES, TRIGGER if embedding else "") if worst[0] == YES else worst


def findings(found: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    """What is wrong with the names and the metadata of a file; the numbers are `inspection`'s business."""
    checks = (
        _leftover,
        _mixed_style,
        _text_model,
        _uneven_alpha,
        _metadata_beside_alpha,
        _block_names,
        _shelves,
        _token,
    )
    return [finding for check in checks for finding in check(found, metadata, family)]


def _leftover(found: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    out = []
    if found.unknown_keys and not found.file_kind:
        shown = found.unknown_keys[0][:80]
        out.append(Finding(f"{len(found.unknown_keys)} key(s) belong to nothing known, first {shown!r}", {"Forge": PARTLY}))
    if found.duplicate_keys:
        out.append(
            Finding(f"{len(found.duplicate_keys)} key(s) repeat another under a second name", dict.fromkeys(PROGRAMS, PARTLY))
        )
    return out


def _mixed_style(found: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    """diffusers judges the UNet by its first key: if that is PEFT's style, attention keys of the other are skipped."""
    if not (found.naming_schemes["PEFT"] and found.naming_schemes["diffusers"]):
        return []
    unet = sorted(module for module in found.modules if module.startswith("unet."))
    old = [module for module in unet if found.module_schemes.get(module) == "diffusers"]
    if not old or old[0] == unet[0]:
        return []
    return [
        Finding(
            f"PEFT's and diffusers' names are mixed: diffusers drops {len(old)} of {len(unet)} UNet modules, silently; "
            "convert --to diffusers repairs it",
            {"diffusers": PARTLY},
        )
    ]


def _text_model(found: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    flat = [m for m, stem in found.key_stems.items() if m.startswith("text_") and "text_model" not in stem]
    flat = [module for module in flat if "text_projection" not in module]
    if not flat:
        return []
    text = f"{len(flat)} text-encoder module(s) lack 'text_model' and are dropped; convert puts it back"
    return [Finding(text, dict.fromkeys(OTHERS, PARTLY))]


def _uneven_alpha(found: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    """Alphas or ranks that differ among attention modules of one part: right for kohya's tools, wrong in diffusers."""
    out = []
    for part in ("unet", "text_encoder", "text_encoder_2"):
        marks = ".attn" if part == "unet" else ".layers."
        own = [p for m, p in found.modules.items() if m.startswith(f"{part}.") and marks in m and "A" in p]
        alphas = {(float(p["alpha"]) if p["alpha"].numel() == 1 else -1.0) if "alpha" in p else None for p in own}
        ranks = {p["A"].shape[0] if p["A"].ndim else 0 for p in own}
        if found.naming_schemes["kohya"] and (len(alphas) > 1 or len(ranks) > 1):
            text = f"alphas or ranks differ among the attention modules of {part}: diffusers takes wrong strengths"
            out.append(Finding(f"{text}, silently; convert bakes them in", {"diffusers": NO}))
    return out


def _metadata_beside_alpha(found: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    alphas = any("alpha" in parts for parts in found.modules.values())
    told = "lora_adapter_metadata" in metadata
    if told and alphas:
        return [
            Finding("it has both lora_adapter_metadata and alpha keys: diffusers refuses such a file", {"diffusers": NO})
        ]
    if not told and not alphas and (found.naming_schemes["PEFT"] or found.naming_schemes["diffusers"]):
        return [Finding("nothing says what alpha is: readers take alpha = rank, right only if it was trained so")]
    return []


def _block_names(found: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    flat = re.compile(r"lora_unet_(down_blocks|mid_block|up_blocks|add_embedding|time_embedding|conv_)")
    new = [module for module, stem in found.key_stems.items() if flat.match(stem)]
    if family != "sdxl" or not new:
        return []
    text = f"{len(new)} SDXL module(s) have diffusers' block names, which tools that know the original ones reject"
    return [Finding(f"{text}; convert --to kohya renames them", {"sd-scripts": NO, "InvokeAI": PARTLY})]


def _shelves(found: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    """A1111 sorts a LoRA by its metadata, and hides what it takes for another family."""
    if not metadata or not found.naming_schemes["kohya"] or family not in ("sd2", "sdxl"):
        return []
    version = metadata.get("ss_base_model_version", "")
    right = version.startswith("sdxl_") if family == "sdxl" else metadata.get("ss_v2") == "True"
    text = f"the metadata do not say {family}: A1111 takes the file for SD 1.x and hides it beside a {family} model"
    return [] if right else [Finding(f"{text}; convert --to kohya writes them", {"A1111": PARTLY})]


def _token(found: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    if found.file_kind in ("textual inversion, A1111 form", "textual inversion, SDXL form"):
        return [Finding(f"the file does not name its token: {TRIGGER}")]
    return []
