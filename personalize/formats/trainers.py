"""Which program wrote an adapter file, by its header and by its names of modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from personalize.errors import UserError
from personalize.io.json_files import parse_json

BY_NAMES = {  # naming schemes that one program alone writes
    "OneTrainer": "OneTrainer", "XLabs": "XLabs' trainer", "ai-toolkit": "ai-toolkit", "LyCORIS": "SimpleTuner",
    "PEFT folder": "PEFT",
}  # fmt: skip
KOHYA_MODULES = {  # `ss_network_module` by how it begins
    "networks.lora_qwen": "musubi-tuner", "networks.lora_zimage": "musubi-tuner", "networks.lora_krea": "musubi-tuner",
    "networks.lora_flux_2": "musubi-tuner", "lycoris": "LyCORIS, in sd-scripts", "networks.": "sd-scripts",
}  # fmt: skip


def written_by(metadata: Mapping[str, str], schemes: Iterable[str]) -> str:
    """The program, and what tells it; "" if nothing does.

    Args:
        metadata: the file's header.
        schemes: the naming schemes of its keys.
    """
    if software := _software(metadata.get("software", "")):
        return f"{software} (its header says so)"
    if any(key.startswith("ot_") for key in metadata):
        return "OneTrainer (its header says so)"
    if implementation := metadata.get("modelspec.implementation", ""):
        return f"{implementation[:80]} (its header says so)"
    module = metadata.get("ss_network_module", "")
    if program := next((name for start, name in KOHYA_MODULES.items() if module.startswith(start)), ""):
        return f"{program} (its header names {module[:40]})"
    if "lora_adapter_metadata" in metadata:
        return "diffusers (its header holds PEFT's settings)"
    named = [BY_NAMES[scheme] for scheme in schemes if scheme in BY_NAMES]
    return f"{named[0]} (by its names of modules)" if named else ""


def _software(text: str) -> str:
    """Name and version of the program in ai-toolkit's `software`, a JSON object."""
    try:
        value = parse_json(text, "software") if text else {}
    except UserError:
        return ""
    known = isinstance(value, dict) and isinstance(value.get("name"), str)
    return f"{value['name'][:40]} {str(value.get('version') or '')[:20]}".strip() if known else ""
