"""What lies on this machine is loaded offline: the hub's own library asks the network even for files in its cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from unittest.mock import patch


@contextmanager
def without_network(enabled: bool = True) -> Iterator[None]:
    """Run the body so that Hugging Face's libraries ask nothing of the network, if `enabled`.

    Beside the files they would send what program asks (telemetry), fetch a list of such programs, and count the loads
    of data sets.
    """
    with ExitStack() as stack:
        if enabled:
            hub = import_module("huggingface_hub.constants")
            for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
                stack.enter_context(patch.object(hub, name, True))
        yield
