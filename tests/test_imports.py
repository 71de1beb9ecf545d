"""What the front door imports: which libraries, since seconds depend on the machine."""

import json
import logging
import subprocess
import sys

import pytest

import personalize
from personalize.models.quiet import hidden_messages, quiet_loading

SLOW = ("diffusers", "transformers", "peft", "bitsandbytes", "datasets", "pandas", "scipy", "matplotlib", "gradio")
IMPORTED = """
import json, sys, personalize
found = {"import personalize": [name for name in NAMES if name in sys.modules]}
for attribute in personalize._MODULES:
    before = set(sys.modules)
    getattr(personalize, attribute)
    found[attribute] = [name for name in NAMES if name in sys.modules and name not in before]
print(json.dumps(found))
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_no_public_name_imports_more_than_torch_and_accelerate():
    """They take 1.5 s of CPU; diffusers' pipelines with peft and transformers take 5 s more, and are used later."""
    found = json.loads(run(IMPORTED.replace("NAMES", repr(("torch", *SLOW)))).stdout)
    assert found.pop("import personalize") == []
    assert {name: [one for one in found[name] if one != "torch"] for name in found} == dict.fromkeys(found, [])
    assert set(found) == set(personalize._MODULES)


@pytest.mark.slow
def test_loading_a_model_prints_nothing_of_other_libraries():
    """A process of its own: these messages come when a library is imported."""
    loaded = run("import personalize; personalize.StableDiffusion.load()")
    assert (loaded.stdout, loaded.stderr) == ("", "")


def test_only_unwanted_messages_are_hidden_and_only_meanwhile(caplog: pytest.LogCaptureFixture):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    unwanted = "Failed to load CPU gemm_4bit_forward from kernels-community: %s."
    with hidden_messages(), hidden_messages():
        logger.warning(unwanted, "No module named 'kernels'")
        logger.warning("something that matters")
    assert [record.getMessage() for record in caplog.records] == ["something that matters"]
    logger.warning(unwanted, "No module named 'kernels'")
    assert len(caplog.records) == 2


@pytest.mark.parametrize("hub_shows", [True, False])
def test_bars_are_as_before_after_loading(hub_shows: bool):
    import diffusers.utils.logging
    import huggingface_hub.utils as hub
    import transformers.utils.logging

    before = hub.are_progress_bars_disabled()
    try:
        transformers.utils.logging.enable_progress_bar()
        (hub.enable_progress_bars if hub_shows else hub.disable_progress_bars)()
        with quiet_loading():
            assert not diffusers.utils.logging.is_progress_bar_enabled()
            assert not transformers.utils.logging.is_progress_bar_enabled()
            assert hub.are_progress_bars_disabled() is not hub_shows, "downloads keep their bars"
        assert (
            diffusers.utils.logging.is_progress_bar_enabled() and transformers.utils.logging.is_progress_bar_enabled()
        )
        assert hub.are_progress_bars_disabled() is not hub_shows
    finally:
        (hub.disable_progress_bars if before else hub.enable_progress_bars)()
