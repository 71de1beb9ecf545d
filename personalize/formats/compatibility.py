"""Which programs read an adapter file, and what is wrong with the file.

A program's verdict on a file ("yes", "unknown", "partly" or "no", with a reason) is the worst one that applies to it:
by the naming scheme of the file's keys, by its algorithms, by its kind, and by each finding.  It is "unknown" where the
file has modules of no model that we know, or an algorithm of which we have not read whether the program takes it.  The
tables hold for diffusers 0.42, peft 0.21, and the other programs' key maps as they were in 2025 and 2026; those on
diffusers are tested.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from personalize.formats.adapter_folders import ADAPTER_CONFIG
from personalize.formats.block_names import NO, PARTLY, UNKNOWN, YES, Finding, block_names
from personalize.formats.layer_kinds import as_layer_wants
from personalize.formats.layouts import FileContents
from personalize.formats.peft_settings import HEADER_ALPHAS

UIS = ("A1111", "Forge", "ComfyUI", "InvokeAI")
PROGRAMS = ("personalize", "diffusers", *UIS, "sd-scripts")
OTHERS = (*UIS, "sd-scripts")
NEEDS_KOHYA_NAMES = "knows modules by kohya's names: convert --to kohya"
SOME_LAYOUTS = {"InvokeAI": (PARTLY, "reads these names only in some layouts")}
BY_NAMING_SCHEME = {  # programs that do not fully read a naming scheme: verdict and reason; all others read it
    "kohya": {},
    "PEFT": {name: (NO, NEEDS_KOHYA_NAMES) for name in OTHERS} | SOME_LAYOUTS,
    "diffusers": {name: (NO, NEEDS_KOHYA_NAMES) for name in OTHERS} | SOME_LAYOUTS,
    "old diffusers": {"sd-scripts": (NO, NEEDS_KOHYA_NAMES)}
    | {name: (PARTLY, "support for the old processor names comes and goes") for name in ("A1111", "Forge")},
    "ComfyUI": {name: (NO, "does not know ComfyUI's names: convert the file") for name in PROGRAMS[1:]}
    | {"ComfyUI": (YES, ""), "Forge": (YES, "")},
    "PEFT folder": {name: (NO, "PEFT's own layout, which only PEFT loads: convert the file") for name in PROGRAMS[1:]},
    "OneTrainer": {name: (NO, "knows modules by other names: convert the file") for name in PROGRAMS[1:]},
    "no prefix": {name: (NO, "loads nothing: the names lack their 'unet.'; convert the file") for name in PROGRAMS[1:]},
}  # fmt: skip
LYCORIS = {
    "sd-scripts": (PARTLY, "needs the package lycoris-lora"),
    "diffusers": (NO, "raises: it knows plain LoRA only"),
}
NOT_READ = {"ComfyUI": (NO, "drops it with a warning"), "Forge": (NO, "drops it with a warning")}
BY_ALGORITHM = {  # for each algorithm: what every program makes of it, if it does not read it fully
    "LoRA": {},
    "Tucker LoCon": {"diffusers": (NO, "raises on lora_mid: convert multiplies it into lora_down")},
    "DoRA": {"sd-scripts": LYCORIS["sd-scripts"]},
    "LoHa": LYCORIS,
    "LoKr": LYCORIS,
    "GLoRA": LYCORIS | {"InvokeAI": (UNKNOWN, "")},
    "full difference": LYCORIS,
    "bias difference": LYCORIS | {"InvokeAI": (UNKNOWN, ""), "A1111": (UNKNOWN, "")},
    "OFT or BOFT": LYCORIS | {"ComfyUI": (UNKNOWN, ""), "Forge": (UNKNOWN, ""), "InvokeAI": (UNKNOWN, "")},
    "(IA)3": LYCORIS | NOT_READ,
    "Custom Diffusion": {name: (NO, "knows no Custom Diffusion") for name in OTHERS}
    | {"diffusers": (PARTLY, "only with a private argument; a plain load does nothing and says nothing")},
}  # fmt: skip
KOHYAS_DORA = {"diffusers": (NO, "drops kohya's dora_scale with a warning")}  # it reads PEFT's lora_magnitude_vector
BY_FILE_KIND = {  # programs that do not fully read a kind of file
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
    "textual inversion, OneTrainer SDXL form": {"diffusers": (NO, "raises: pass each tensor to its own encoder")},
    "textual inversion, cog-sdxl form": {name: (NO, "only cog-sdxl reads it") for name in PROGRAMS[1:]},
}  # fmt: skip
OF_COMMON_ALPHA = re.compile(r"unet\..*\.attn\d?\.to_(q|k|v|out\.0)|text_encoder\..*|text_encoder_2\..*_proj")
TRIGGER = "the trigger is the file's name"


def readers(
    contents: FileContents, findings: list[Finding], elsewhere: Sequence[str] = ()
) -> dict[str, tuple[str, str]]:
    """For each program: whether it reads the file ("yes", "unknown", "partly" or "no"), and the reason.

    `elsewhere` are the modules of the file that are in no model of its family.
    """
    return {program: _verdict(program, contents, findings, elsewhere) for program in PROGRAMS}


def _verdict(
    program: str, contents: FileContents, findings: list[Finding], elsewhere: Sequence[str]
) -> tuple[str, str]:
    """The worst verdict on a file that applies to `program`, and its reason."""
    if not contents.modules and not contents.file_kind:
        return NO, "nothing known is in it"
    tables = [BY_NAMING_SCHEME[scheme] for scheme in contents.naming_schemes]
    tables += [BY_ALGORITHM[name] for name in contents.algorithm_counts]
    tables += [KOHYAS_DORA] if any("dora_scale" in parts for parts in contents.modules.values()) else []
    tables += [BY_FILE_KIND[contents.file_kind]] if contents.file_kind in BY_FILE_KIND else []
    reasons = [table[program] for table in tables if program in table]
    reasons += [(finding.programs[program], finding.text) for finding in findings if program in finding.programs]
    if elsewhere and program == "personalize":
        reasons.append(refused(elsewhere))
    elif elsewhere and len(elsewhere) == len(contents.modules):
        reasons.append((UNKNOWN, "it is for another kind of model"))
    elif elsewhere:
        reasons.append((PARTLY, f"drops {len(elsewhere)} module(s) that the model does not have, first {elsewhere[0]}"))
    worst = max(reasons, key=lambda reason: (YES, UNKNOWN, PARTLY, NO).index(reason[0]), default=(YES, ""))
    embedding = contents.file_kind.startswith("textual inversion") and program in UIS
    if worst == (UNKNOWN, ""):
        return UNKNOWN, "whether it takes this algorithm was not read"
    return (YES, TRIGGER if embedding else "") if worst[0] == YES else worst


def refused(elsewhere: Sequence[str]) -> tuple[str, str]:
    """The verdict of this program, which leaves out nothing in silence, on modules that its models do not have."""
    return NO, f"{len(elsewhere)} module(s), first {elsewhere[0][:120]}, are in no model of its family"


def dropped(found: Sequence[Finding], elsewhere: Sequence[str], count: int) -> dict[str, list[str]]:
    """By program, the modules that it drops: those of findings, and those that are in no model of the family.

    Args:
        found: what is wrong with the file.
        elsewhere: its modules that no model of its family has.
        count: how many modules it has; if all are elsewhere, the model is of another kind, and nothing is said.
    """
    lost = {program: set(elsewhere) if len(elsewhere) < count else set() for program in PROGRAMS}
    for finding in found:
        for program in (name for name, verdict in finding.programs.items() if verdict != UNKNOWN):
            lost[program] |= set(finding.modules)
    return {program: sorted(modules) for program, modules in lost.items() if modules}


def findings(contents: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    """What is wrong with the keys and the metadata of a file; `inspection` checks the values of its tensors."""
    checks = (
        _unknown_or_duplicate_keys,
        _words_of_wrappers,
        _projection_alone,
        _mixed_naming_schemes,
        _missing_text_model,
        _uneven_alpha_or_rank,
        _other_dimensions,
        _alpha_in_two_places_or_none,
        block_names,
        _family_in_metadata,
        _no_token_name,
    )
    return [finding for check in checks for finding in check(contents, metadata, family)]


def _unknown_or_duplicate_keys(
    contents: FileContents, metadata: Mapping[str, str], family: str | None
) -> list[Finding]:
    """Keys that are not recognised, and keys that give a factor a second time."""
    out = []
    if contents.unknown_keys and not contents.file_kind:
        text = f"{len(contents.unknown_keys)} key(s) belong to nothing known, first {contents.unknown_keys[0][:80]!r}"
        out.append(Finding(text, {"Forge": PARTLY}))
    if contents.duplicate_keys:
        out.append(
            Finding(
                f"{len(contents.duplicate_keys)} key(s) repeat another under a second name",
                dict.fromkeys(PROGRAMS, PARTLY),
            )
        )
    return out


def _words_of_wrappers(contents: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    """Keys with words that torch.compile, data parallelism or PEFT put into them."""
    return [
        Finding(
            f"{count} key(s) carry {word!r}, the word of a wrapper: convert takes it out",
            dict.fromkeys(OTHERS, NO) | {"diffusers": UNKNOWN if word == "_orig_mod" else NO},
        )
        for word, count in contents.wrappers.items()
    ]


def _projection_alone(contents: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    """A text projection as the only module of a text encoder."""
    second = [module for module in contents.modules if module.startswith("text_encoder_2.")]
    if second != ["text_encoder_2.text_projection"]:
        return []
    return [Finding("text_projection is the text encoder's only module: diffusers raises", {"diffusers": NO})]


def _mixed_naming_schemes(contents: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    """PEFT's and diffusers' names in one file.

    diffusers takes the naming scheme of the UNet's first key for all of them: if that key is in PEFT's names, it skips
    attention modules in its own.
    """
    if not (contents.naming_schemes["PEFT"] and contents.naming_schemes["diffusers"]):
        return []
    unet = sorted(module for module in contents.modules if module.startswith("unet."))
    old = [module for module in unet if contents.module_schemes.get(module) == "diffusers"]
    if not old or old[0] == unet[0]:
        return []
    return [
        Finding(
            f"PEFT's and diffusers' names are mixed: diffusers drops {len(old)} of {len(unet)} UNet modules, silently; "
            "convert --to diffusers repairs it",
            {"diffusers": PARTLY},
            tuple(old),
        )
    ]


def _missing_text_model(contents: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    """Text encoder modules whose keys lack the level `text_model`."""
    lacking = [m for m, stem in contents.key_stems.items() if m.startswith("text_") and "text_model" not in stem]
    lacking = [module for module in lacking if "text_projection" not in module]
    if not lacking:
        return []
    text = f"{len(lacking)} text-encoder module(s) lack 'text_model' and are dropped; convert puts it back"
    return [Finding(text, dict.fromkeys(OTHERS, PARTLY), tuple(lacking))]


def _uneven_alpha_or_rank(contents: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    """Alphas that differ in one part of the model: kohya's tools load them correctly, diffusers does not.

    It takes the most common alpha of the part for attention's projections, for the first text encoder, whose modules
    transformers calls otherwise than the file, and for modules without alpha.
    """
    found = []
    for part in ("unet", "text_encoder", "text_encoder_2") if contents.naming_schemes["kohya"] else ():
        ranks = {m: len(p["A"]) for m, p in contents.modules.items() if m.startswith(f"{part}.") and _is_matrix(p)}
        stored = {m: contents.modules[m]["alpha"] for m in ranks if "alpha" in contents.modules[m]}
        alphas = {m: float(alpha) for m, alpha in stored.items() if alpha.numel() == 1}
        if not alphas:
            continue
        common = Counter(alphas.values()).most_common(1)[0][0]
        taken = {m: common if OF_COMMON_ALPHA.fullmatch(m) else alphas.get(m, common) for m in ranks}
        if wrong := tuple(m for m, rank in ranks.items() if taken[m] != (alphas.get(m) or rank)):
            text = f"alphas or ranks differ among the modules of {part}, or are 0: diffusers takes {len(wrong)} wrong"
            found.append(Finding(f"{text} strengths, silently; convert makes them one", {"diffusers": NO}, wrong))
    return found


def _is_matrix(parts: Mapping[str, Tensor]) -> bool:
    return "A" in parts and parts["A"].ndim > 1


def _other_dimensions(contents: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    """Factors with another number of dimensions than their layer: graphical programs reshape them, diffusers raises."""
    odd = [
        module for module, parts in contents.modules.items() if _is_matrix(parts)
        if any(shaped.ndim != parts[role].ndim for role, shaped in as_layer_wants(parts, module, family).items())
    ]  # fmt: skip
    if not odd:
        return []
    text = f"{len(odd)} module(s) are stored with the dimensions of another kind of layer, first {odd[0]}"
    return [Finding(f"{text}: diffusers raises; convert gives them those of their own", {"diffusers": NO})]


def _alpha_in_two_places_or_none(
    contents: FileContents, metadata: Mapping[str, str], family: str | None
) -> list[Finding]:
    """alpha both in diffusers' metadata and in alpha keys, or in neither."""
    alphas = any("alpha" in parts for parts in contents.modules.values())
    has_metadata = "lora_adapter_metadata" in metadata
    if has_metadata and alphas:
        return [
            Finding(
                "it has both lora_adapter_metadata and alpha keys: diffusers refuses such a file", {"diffusers": NO}
            )
        ]
    header = [key for key in HEADER_ALPHAS if metadata.get(key, "None") != "None"]
    if header and not alphas and not has_metadata:
        text = f"alpha stands in the header alone ({header[0]} = {metadata[header[0]][:20]}): convert writes it where"
        return [
            Finding(f"{text} programs look, others take alpha = rank", dict.fromkeys((*OTHERS, "diffusers"), PARTLY))
        ]
    stated = has_metadata or ADAPTER_CONFIG in metadata
    if not stated and not alphas and {"PEFT", "diffusers", "PEFT folder"} & contents.naming_schemes.keys():
        return [Finding("nothing says what alpha is: readers take alpha = rank, right only if it was trained so")]
    return []


def _family_in_metadata(contents: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    """Metadata that do not state the family: A1111 lists only LoRAs whose metadata say the loaded model's family."""
    if not metadata or not contents.naming_schemes["kohya"] or family not in ("sd2", "sdxl"):
        return []
    version = metadata.get("ss_base_model_version", "")
    correct = version.startswith("sdxl_") if family == "sdxl" else metadata.get("ss_v2") == "True"
    text = f"the metadata do not say {family}: A1111 takes the file for SD 1.x and hides it beside a {family} model"
    return [] if correct else [Finding(f"{text}; convert --to kohya writes them", {"A1111": PARTLY})]


def _no_token_name(contents: FileContents, metadata: Mapping[str, str], family: str | None) -> list[Finding]:
    """Layouts of learned tokens that do not hold the token itself."""
    if contents.file_kind in ("textual inversion, A1111 form", "textual inversion, SDXL form"):
        return [Finding(f"the file does not name its token: {TRIGGER}")]
    return []
