"""Sampling as replays of one CUDA graph (`cuda_graph`): to the bit the pictures of the loop."""

import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch

from personalize.adapters.adapter import Adapter
from personalize.editing.config import Sampling
from personalize.editing.editor import Editor
from personalize.errors import Notice, UserError
from personalize.sampling.config import SCHEDULERS
from tests.rehearsal.graphs import Graph
from tests.rehearsal.record import FORBIDDEN, RECORD
from tests.rehearsal.support import apart, base, learned, on_cpu, photo
from tests.support.runs import SMALL

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MORE = {"forget": "decoder=0.5", "negative_prompt": "blue", "seeds": (0, 1, 2)}
STEPS = Sampling(steps=8)  # three are made before the recording


@pytest.fixture(scope="module")
def adapters() -> dict[str, Adapter]:
    return {name: on_cpu(learned, name)[1] for name in ("sd1", "sd2v", "sdxl")}


@pytest.fixture
def replays(monkeypatch) -> list[Graph]:
    made, before = [], Graph.replay

    def counted(graph):
        made.append(graph)
        before(graph)

    monkeypatch.setattr(Graph, "replay", counted)
    return made


def pair(model, adapter, sampling=STEPS, **settings):
    """Pictures of the loop and of the graph."""
    return [
        Editor(model, adapter).edit("a dog", sampling=replace(sampling, cuda_graph=graph), **settings)
        for graph in (False, True)
    ]


@pytest.mark.parametrize("name, dtype", [("sd1", FP32), ("sd2v", FP32), ("sdxl", FP32), ("sd1", BF16), ("sdxl", FP16)])
@pytest.mark.parametrize("more", [{}, MORE], ids=["one", "several"])
def flow_graphed_edit(adapters, replays, name, dtype, more):
    plain, graph = pair(base(name, dtype=dtype), adapters[name], **more)
    assert max(map(apart, plain, graph)) == 0 and len(plain) == len(graph) == len(more.get("seeds", (0,)))
    assert len(replays) == 5 and len(set(replays)) == 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance", [None, 1.0])
def flow_graphed_schedulers(adapters, replays, scheduler, guidance):
    """The predictions replay; the steps of diffusers' schedulers are their own, also those that draw noise."""
    plain, graph = pair(base(), adapters["sd1"], replace(STEPS, scheduler=scheduler, guidance_scale=guidance))
    assert apart(plain[0], graph[0]) == 0 and len(replays) >= 5


def flow_graph_of_timestep_rank(replays):
    """An adapter whose rank depends on the timestep reads that on the device."""
    adapter = on_cpu(learned, "sd1", replace(SMALL, min_rank=1, max_train_samples=8, learning_rate=1e-2))[1]
    plain, graph = pair(base(), adapter)
    assert apart(plain[0], graph[0]) == 0 and replays


def flow_graph_on_the_second_gpu(adapters, replays):
    editor = Editor(base(device="cuda:1"), adapters["sd1"])
    with editor:
        plain = [picture for seed in (0, 1) for picture in editor.edit("a dog", seeds=[seed], sampling=STEPS)]
        graph = [editor.edit("a dog", seeds=[s], sampling=replace(STEPS, cuda_graph=True))[0] for s in (0, 1)]
        assert apart(editor.base("a dog", sampling=STEPS)[0],
                     editor.base("a dog", sampling=replace(STEPS, cuda_graph=True))[0]) == 0  # fmt: skip
    assert max(map(apart, plain, graph)) == 0 and replays


def flow_graph_in_four_bits(adapters, replays):
    model = base(dtype=BF16)
    model.quantize()
    plain, graph = pair(model, adapters["sd1"])
    assert apart(plain[0], graph[0]) == 0 and replays


def flow_graph_of_a_search(adapters, replays):
    from personalize.evaluation.scoring import Scores

    class Fixed:
        name, copy_distance, lost_distance = "fixed", 0.25, 0.65

        def __call__(self, pictures, request):
            return [Scores(0.9, 0.8, 0.4) for _ in pictures]

    editor = Editor(base(), adapters["sd1"])
    kinds = [replace(STEPS, cuda_graph=graph) for graph in (False, True)]
    plain, graph = ([trial.picture for trial in editor.choose("a dog", photo(), budget=3, scorer=Fixed(), sampling=one)]
                    for one in kinds)  # fmt: skip
    assert max(map(apart, plain, graph)) == 0 and len(set(replays)) >= 2


def flow_no_wait_in_a_replay(adapters):
    """A longer schedule waits for the device no more often than a short one."""
    editor = Editor(base(), adapters["sd1"])
    editor.edit("a dog", sampling=STEPS)  # copies the adapter to the device, once
    counts = []
    for steps in (8, 16):
        with RECORD.of() as events:
            editor.edit("a dog", sampling=Sampling(steps=steps, cuda_graph=True))
        counts.append(Counter((event.kind, event.place) for event in events if event.kind in FORBIDDEN))
    assert counts[0] == counts[1], counts


def flow_what_falls_back_says_so(adapters, replays):
    with pytest.warns(Notice, match="without a CUDA graph: 4 steps are too few"):
        plain, graph = pair(base(), adapters["sd1"], Sampling(steps=4))
    assert apart(plain[0], graph[0]) == 0 and not replays
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        pair(base(), adapters["sd1"], Sampling(steps=5))
    with pytest.raises(UserError, match="cuda_graph needs a CUDA device, this is cpu"):
        pair(base(device="cpu"), adapters["sd1"])
