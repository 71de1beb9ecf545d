"""Prompts with learned tokens, and their projection: conditioning from a learned source embedding and a prompt."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor

ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "clip_h": "text_encoder"}
TINY = 1e-12  # least norm in the division: where the source row is zero, the edit is the whole target row


def with_tokens(clip: Any, tokens: dict[str, dict[str, Tensor]]) -> Any:
    """A clone of `clip` whose tokenizers know the learned `tokens`, for every node that is given it.

    Raises:
        ValueError: an adapter before this one has a token of the same name with other rows.
    """
    clip = clip.clone()
    if not tokens:
        return clip
    clip.tokenizer = copy.copy(clip.tokenizer)
    for name in _parts(clip):
        tokenizer: Any = copy.copy(getattr(clip.tokenizer, name))
        if not isinstance(tokenizer, LearnedTokens):
            tokenizer.__class__ = type("TokenizerWithLearnedTokens", (LearnedTokens, type(tokenizer)), {})
            tokenizer.learned = {}
        rows = {token.lower(): parts[ENCODERS[name]] for token, parts in tokens.items()}
        for token in rows.keys() & tokenizer.learned.keys():
            if not torch.equal(rows[token], tokenizer.learned[token]):
                raise ValueError(f"another adapter here has a token {token} of its own: train one with another token")
        tokenizer.learned = {**tokenizer.learned, **rows}
        tokenizer.embedding_directory = tokenizer.embedding_directory or []
        setattr(clip.tokenizer, name, tokenizer)
    return clip


def _parts(clip: Any) -> list[str]:
    """The names of the text encoders in `clip`, in the order of their slices of the embedding's width."""
    names = [name for name in ENCODERS if hasattr(clip.cond_stage_model, name)]
    if not names:
        raise ValueError("these nodes are for Stable Diffusion 1, 2 and XL: this CLIP is of another family")
    return names


class LearnedTokens:
    """A tokenizer of ComfyUI for which learned tokens, written as `<cat>`, are embeddings `embedding:…`."""

    learned: dict[str, Tensor]
    embedding_directory: Any

    def tokenize_with_weights(self, text: str, *args: Any, **more: Any) -> Any:
        words = list(self.learned)
        pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))

        def named(match: re.Match[str]) -> str:
            return f" {self.embedding_identifier}personalize-token-{words.index(match[0].lower())} "  # type: ignore[attr-defined]

        text = re.sub(pattern, named, text, flags=re.IGNORECASE)
        return super().tokenize_with_weights(text, *args, **more)  # type: ignore[misc]

    def _try_get_embedding(self, embedding_name: str, *args: Any) -> Any:
        name, _, left = embedding_name.partition(" ")
        number = re.fullmatch(r"personalize-token-(\d+)", name)
        if number is None:
            return super()._try_get_embedding(embedding_name, *args)  # type: ignore[misc]
        return list(self.learned.values())[int(number[1])], left.strip()


def projected(clip: Any, source: Any, text: str, alpha: float, beta: float) -> list[list[Any]]:
    """ComfyUI's conditioning: `alpha` times the source plus `beta` times the part of the prompt orthogonal to it.

    SDXL's two text encoders are projected separately, and its pooled embedding like one more row.  Of different numbers
    of chunks of 75 tokens the shorter is continued by the empty text.  Without a source it is the prompt's own; of an
    `adapter_folder.Source` of several captions the row of the one nearest to the prompt is taken.  The prompt is worded
    like that caption.
    """
    row, text = (None, text) if source is None else source.nearest(text)
    about = _encoded(clip, text)
    embeds = about.pop("cond")
    if row is None:
        return [[embeds, about]]
    learned, empty = row["embeds"].to(embeds), _encoded(clip, "")["cond"]
    if learned.shape[-1] != embeds.shape[-1]:
        raise ValueError(f"the source embedding is {learned.shape[-1]} wide, this CLIP's prompts {embeds.shape[-1]}")
    length = max(learned.shape[1], embeds.shape[1])
    learned, embeds = (
        torch.cat([rows] + [empty] * ((length - rows.shape[1]) // empty.shape[1]), 1) for rows in (learned, embeds)
    )
    models = [getattr(clip.cond_stage_model, name) for name in _parts(clip)]
    widths = [model.transformer.get_input_embeddings().weight.shape[1] for model in models]
    pairs = zip(learned.split(widths, -1), embeds.split(widths, -1), strict=True)
    if "pooled" in row and about.get("pooled_output") is not None:
        pooled = about["pooled_output"]
        about["pooled_output"] = project(row["pooled"].to(pooled), pooled, alpha, beta)
    return [[torch.cat([project(s, p, alpha, beta) for s, p in pairs], -1), about]]


def project(source: Tensor, target: Tensor, alpha: float, beta: float) -> Tensor:
    """alpha · s + beta · (p − (p · u) u),  u = s / ‖s‖, row by row  (Zhang et al., "Forgedit", arXiv 2309.10556)."""
    unit = source / torch.linalg.vector_norm(source, dim=-1, keepdim=True).clamp_min(TINY)
    return alpha * source + beta * (target - (target * unit).sum(-1, keepdim=True) * unit)


def _encoded(clip: Any, text: str) -> dict[str, Any]:
    """ComfyUI's encoding of `text`: "cond" (1, k·77, d), "pooled_output", …"""
    tokens = clip.tokenize(text, return_word_ids=True)
    keys = {key: getattr(clip.tokenizer, f"clip_{key}") for key in tokens}
    chunks = {key: filled(tokens[key], tokenizer) for key, tokenizer in keys.items()}
    most = max(map(len, chunks.values()))
    for key, tokenizer in keys.items():
        chunks[key] += [_closed([], tokenizer)] * (most - len(chunks[key]))
    return clip.encode_from_tokens(chunks, return_pooled=True, return_dict=True)


def filled(batches: list[list[tuple[Any, float, int]]], tokenizer: Any) -> list[list[tuple[Any, float]]]:
    """The chunks of a prompt filled to the last token, as in training; only a learned token's vectors stay together.

    ComfyUI itself begins a new chunk where a short piece of a prompt does not fit.
    """
    groups: list[tuple[int, list[tuple[Any, float]]]] = []
    for token, weight, word in (entry for batch in batches for entry in batch if entry[2]):
        if isinstance(token, Tensor) and groups and groups[-1][0] == word:
            groups[-1][1].append((token, weight))
        else:
            groups.append((word if isinstance(token, Tensor) else 0, [(token, weight)]))
    room, chunks = tokenizer.max_length - 2, [[]]
    for _, group in groups:
        if len(chunks[-1]) + min(len(group), room) > room:
            chunks.append([])
        chunks[-1] += group[:room]
    return [_closed(chunk, tokenizer) for chunk in chunks]


def _closed(chunk: list[tuple[Any, float]], tokenizer: Any) -> list[tuple[Any, float]]:
    """`chunk` between its start and end marks, padded."""
    whole = [(tokenizer.start_token, 1.0), *chunk, (tokenizer.end_token, 1.0)]
    return whole + [(tokenizer.pad_token, 1.0)] * (tokenizer.max_length - len(whole))
