"""The nodes: load an adapter folder, and a prompt projected onto its source embedding."""

# pyright: reportMissingImports=false

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import folder_paths

from .adapter_folder import MANIFEST, read_adapter
from .patches import patched
from .prompts import projected, with_tokens

CATEGORY = "personalize"
SOURCE = "PERSONALIZE_SOURCE"
ALPHA, BETA = 0.8, 1.2  # as `personalize edit` has them: these nodes import nothing of that package


def adapter_folders() -> dict[str, Path]:
    """Every adapter folder below ComfyUI's folders for LoRAs, by its relative path."""
    roots = [Path(root) for root in folder_paths.get_folder_paths("loras")]
    found = [(root, manifest.parent) for root in roots for manifest in sorted(root.rglob(MANIFEST))]
    return {folder.relative_to(root).as_posix(): folder for root, folder in reversed(found)}  # the first root wins


class LoadAdapter:
    """Load an adapter folder: LoRA, learned tokens, and the source embedding for `ProjectedPrompt`."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("MODEL", "CLIP", SOURCE, "STRING"), ("model", "clip", "source", "caption")
    DESCRIPTION = "An adapter folder of Personalize below models/loras. The caption is the first it was trained with."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        rule = {"default": "none", "tooltip": "Forgetting rules, e.g. decoder=0.5 or encoderattn; several joined by +"}
        strength = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "adapter": (sorted(adapter_folders()),),
                "strength": ("FLOAT", strength),
                "forget": ("STRING", rule),
            }
        }

    @classmethod
    def IS_CHANGED(cls, adapter: str, **_: Any) -> str:
        folder = adapter_folders().get(adapter)
        return sha256((folder / MANIFEST).read_bytes()).hexdigest() if folder else "absent"

    def load(self, model: Any, clip: Any, adapter: str, strength: float, forget: str) -> tuple[Any, ...]:
        known = adapter_folders()
        if adapter not in known:
            raise ValueError(f"there is no adapter folder {adapter!r} below ComfyUI's folders for LoRAs")
        read = read_adapter(known[adapter])
        model, clip = patched(model, clip, read, strength, forget)
        return model, with_tokens(clip, read.tokens), read.source, read.caption


class ProjectedPrompt:
    """A prompt as an edit of the adapter's source embedding."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "encode", ("CONDITIONING",)
    DESCRIPTION = "alpha: weight of the learned picture. beta: weight of what the prompt adds to it."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        alpha, beta = ({"default": usual, "min": -10.0, "max": 10.0, "step": 0.05} for usual in (ALPHA, BETA))
        text = ("STRING", {"multiline": True, "dynamicPrompts": True})
        required = {"clip": ("CLIP",), "text": text, "alpha": ("FLOAT", alpha), "beta": ("FLOAT", beta)}
        return {"required": required, "optional": {"source": (SOURCE,)}}

    def encode(self, clip: Any, text: str, alpha: float, beta: float, source: Any = None) -> tuple[Any]:
        return (projected(clip, source, text, alpha, beta),)


NODE_CLASS_MAPPINGS = {"PersonalizeLoadAdapter": LoadAdapter, "PersonalizeProjectedPrompt": ProjectedPrompt}
NODE_DISPLAY_NAME_MAPPINGS = {
    "PersonalizeLoadAdapter": "Load Adapter (Personalize)",
    "PersonalizeProjectedPrompt": "Projected Prompt (Personalize)",
}
