"""An adapter folder of Personalize, read with safetensors and JSON alone."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

MANIFEST = "adapter.json"
SCHEMA = 1  # the highest that is understood here
NEUTRAL, ANY = ("photo", "photograph", "picture", "image"), ("picture", "image")
PREFIX = re.compile(
    r"(an?|the) (?P<medium>photo|photograph|picture|image|drawing|painting|sketch|render|rendering|icon|sticker|cartoon"
    r"|illustration|sculpture|statue|close-up|portrait) of ",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Source:
    """The fitted source embedding: "embeds" (p, l, d), for SDXL "pooled" (p, e) too, a row for each of p captions."""

    tensors: dict[str, Tensor]
    captions: tuple[str, ...]

    def nearest(self, prompt: str) -> tuple[dict[str, Tensor], str]:
        """The row, with p = 1, of the caption that has most words in common with `prompt`, in the same order.

        The measure is 2 m / (n + k) for m common words of n in the prompt and k in the caption; the first of equals.
        With it comes the prompt worded like that caption.
        """
        words = prompt.casefold().split()
        ratios = [SequenceMatcher(None, words, text.casefold().split(), False).ratio() for text in self.captions]
        row = ratios.index(max(ratios))
        nearest = {name: rows[row : row + 1] for name, rows in self.tensors.items()}
        return nearest, worded(prompt, self.captions[row])


def worded(prompt: str, caption: str) -> str:
    """`prompt` with the caption's beginning, such as "a photo of", or without it if the caption has none.

    A source embedding is edited token by token, so that equal words must stand at equal places.  A medium that only the
    prompt names, as in "a drawing of a dog", is part of the edit and stays.
    """
    prompt = prompt.strip()
    of_caption, of_prompt = PREFIX.match(caption.strip()), PREFIX.match(prompt)
    replaceable = NEUTRAL if of_caption is None or of_caption["medium"].lower() in NEUTRAL else ANY
    if not prompt or (of_prompt is not None and of_prompt["medium"].lower() not in replaceable):
        return prompt
    rest = prompt[of_prompt.end() :] if of_prompt else prompt
    if of_caption is not None:
        return of_caption[0] + rest
    return worded(rest, caption) if of_prompt else rest


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds.

    lora: A (rank, in[, k, k]) and B (out, rank[, 1, 1]) by module: "unet.…" in diffusers' names, "text_encoder.…".
    alpha: ΔW = (alpha / rank) · B A.
    source: the fitted source embedding; None without one.
    tokens: learned tokens, each with rows (n, d) by text encoder.
    timestep_rank: the rule of a rank that depends on the timestep; None if all components always take part.
    """

    lora: dict[str, tuple[Tensor, Tensor]]
    alpha: float
    source: Source | None
    tokens: dict[str, dict[str, Tensor]]
    caption: str
    timestep_rank: dict[str, Any] | None


def read_adapter(folder: Path) -> Adapter:
    """Read the adapter in `folder`; ValueError if it is none or of a later version."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        schema, alpha, names = int(manifest["schema"]), float(manifest["alpha"]), list(manifest["files"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is no adapter folder of Personalize ({error!r})") from error
    if schema > SCHEMA:
        raise ValueError(f"{folder} has schema {schema}, these nodes read up to {SCHEMA}: update them")
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    stems = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return Adapter(
        {stem: (tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]) for stem in stems},
        alpha,
        _source(folder, manifest) if manifest.get("source_tensors") else None,
        _tokens(folder, names, set(manifest.get("concepts", {}))),
        str(manifest.get("caption") or ""),
        manifest.get("timestep_rank") or json.loads((manifest.get("header") or {}).get("ss_timestep_rank", "null")),
    )


def _source(folder: Path, manifest: dict[str, Any]) -> Source:
    """The source embedding and its captions; ValueError if these are not as many as its rows."""
    tensors = load_file(folder / "source_embedding.safetensors")
    captions = tuple(map(str, manifest.get("captions") or [manifest.get("caption") or ""]))
    rows = len(tensors["embeds"])
    if rows == 1:  # of versions that kept one row: the first caption's
        captions = captions[:1]
    if len(captions) != rows:
        raise ValueError(f"{folder} has {rows} source embeddings and {len(captions)} captions: save the adapter again")
    return Source(tensors, captions)


def _tokens(folder: Path, names: list[str], wanted: set[str]) -> dict[str, dict[str, Tensor]]:
    """The rows of the `wanted` tokens, from the files in diffusers' layout; ValueError if one is missing."""
    tokens: dict[str, dict[str, Tensor]] = {}
    for name in names:
        if Path(name).name != name or "learned_embeds" not in name:
            continue
        with safe_open(folder / name, "pt") as file:
            encoder = (file.metadata() or {}).get("personalize.text_encoder", "text_encoder")
            for token in wanted & set(file.keys()):
                tokens.setdefault(token, {})[encoder] = file.get_tensor(token)
    if missing := wanted - set(tokens):
        raise ValueError(f"{folder} lacks the file of its learned token {missing.pop()}: save the adapter again")
    return tokens
