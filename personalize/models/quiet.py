"""Other libraries' messages about parts that are not used here, and their bars for loading files, are hidden."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module

UNWANTED = {  # by logger: how a message begins or goes on that is about an optional part
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "transformers.utils.import_utils": "requires torchvision (not installed)",
    "diffusers.loaders.lora_base": "No LoRA keys associated to",
    "diffusers.loaders.peft": "No LoRA keys associated to",
}


def _wanted(record: logging.LogRecord) -> bool:
    return UNWANTED[record.name] not in record.getMessage()


@contextmanager
def hidden_messages() -> Iterator[None]:
    """Run the body, such as an import, without the messages of `UNWANTED`; all others are printed as before."""
    loggers = [logger for logger in map(logging.getLogger, UNWANTED) if _wanted not in logger.filters]
    for logger in loggers:
        logger.addFilter(_wanted)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_wanted)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Run the body, which loads a model, without those messages and without diffusers' and transformers' own bars.

    Bars of downloads from the hub stay: they take minutes, where a bar helps.
    """
    with hidden_messages(), ExitStack() as stack:
        hub = import_module("huggingface_hub.utils")
        restore = hub.disable_progress_bars if hub.are_progress_bars_disabled() else hub.enable_progress_bars
        stack.callback(restore)
        for library in ("diffusers", "transformers"):
            bars = import_module(f"{library}.utils.logging")
            if bars.is_progress_bar_enabled():
                bars.disable_progress_bar()
                stack.callback(bars.enable_progress_bar)
        restore()  # transformers switches those of the hub with its own
        yield
