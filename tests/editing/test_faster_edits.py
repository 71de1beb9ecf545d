"""`edit --torch_compile` and `--cuda_graph`; the graph itself is rehearsed in tests/rehearsal/flows_sampling.py."""

from __future__ import annotations

import numpy as np
import pytest
from torch._dynamo.utils import counters

from personalize.editing.config import Sampling
from personalize.editing.editor import Editor
from personalize.errors import UserError
from tests.support.lora_states import random_adapter
from tests.support.tiny import tiny


@pytest.fixture(scope="module")
def editor() -> Editor:
    model = tiny("sd1")
    return Editor(model, random_adapter(model))


def test_one_of_both_and_a_graph_on_cuda_alone(editor: Editor) -> None:
    with pytest.raises(UserError, match="cuda_graph does not go with torch_compile"):
        Sampling(torch_compile=True, cuda_graph=True)
    with pytest.raises(UserError, match="cuda_graph needs a CUDA device, this is cpu"):
        editor.edit("a dog", sampling=Sampling(steps=2, cuda_graph=True))


@pytest.mark.slow  # compiles the variants of a block, about a minute
@pytest.mark.timeout(1800)
def test_speed_a_compiled_edit_equals_an_eager_one(editor: Editor) -> None:
    """fp32 sums in another order, 1e-6 a prediction, over four steps: at most one grey level, in few pixels."""
    before = [dict(vars(module)) for module in editor.model.unet.modules()]
    graphs = counters["stats"]["unique_graphs"]
    eager, compiled = (
        editor.edit("a dog", seeds=(0, 1), forget="decoder=0.5", sampling=Sampling(steps=4, torch_compile=flag))
        for flag in (False, True)
    )
    assert counters["stats"]["unique_graphs"] > graphs
    for one, other in zip(eager, compiled, strict=True):
        apart = np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16))
        assert apart.max() <= 1 and apart.mean() < 0.05
    assert [dict(vars(module)).keys() for module in editor.model.unet.modules()] == [own.keys() for own in before]
