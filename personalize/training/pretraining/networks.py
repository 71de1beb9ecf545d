"""The embedded model's architecture: its tokenizer and its three networks."""

# the annotations of diffusers and transformers are narrower than what they accept and return
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TEXT_WIDTH = 128  # d


def byte_symbols() -> list[str]:
    """The 256 printable characters by which byte-level BPE represents the 256 byte values, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every one of `words` is a single token."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for parts in split.values() for pair in zip(parts, parts[1:], strict=False))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in split.items():
            split[word] = _merged(parts, best)


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def build_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """A CLIP tokenizer in which each of `words` is one token; any other text is split into bytes."""
    merges = learn_merges(sorted(set(words)))
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), BOS, EOS]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocab, merges=merges, bos_token=BOS, eos_token=EOS, unk_token=EOS, pad_token=EOS, model_max_length=77
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder of 4 layers and width 128 for `tokenizer`, with random weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_autoencoder() -> AutoencoderKL:
    """An autoencoder of images (b, 3, H, W) in [−1, 1] and latents (b, 4, H/4, W/4), with random weights.

    It has convolutions only, no attention, so that it works at any size.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=128,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """A UNet of 17 M parameters with the blocks, layers and names of SD 1.x's (216 single-image LoRA modules)."""
    return UNet2DConditionModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(64, 128, 160, 160),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 5, 5),  # heads, each 32 channels wide
    )


def build_scheduler() -> DDIMScheduler:
    """The DDIM scheduler with Stable Diffusion 1.x's settings."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def save_pipeline(
    folder: Path,
    *,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
) -> None:
    """Write a Stable Diffusion folder: UNet and VAE in fp16, text encoder in fp32, shards of at most 14 MB."""
    pipe = StableDiffusionPipeline(
        vae=vae.half(), unet=unet.half(), text_encoder=text_encoder.float(), tokenizer=tokenizer,
        scheduler=build_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    vae.register_to_config(_name_or_path="")  # otherwise the config names the folder that the VAE was read from
    pipe.save_pretrained(folder, max_shard_size="14MB")


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (b, 77), padded and truncated as by StableDiffusionPipeline."""
    return tokenizer(list(texts), padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
