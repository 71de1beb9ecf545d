"""`attach` on pipelines of the user: of any precision, offloaded, spread, compiled; afterwards as before."""

import numpy as np
import pytest
import torch

import personalize
from personalize.errors import UserError
from tests.rehearsal.support import base, learned, pipeline

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    for name in ("sd1", "sdxl"):
        learned(base(name, "cpu"))[1].save(place / name)
    return place


def _draw(pipe, seed=0, **prompt):
    made = pipe(**prompt, num_inference_steps=3, generator=torch.Generator().manual_seed(seed), height=64, width=64)
    return np.asarray(made.images[0], np.float64)


def _attached(pipe, folder):
    """Pictures with the adapter, by embeddings and by a prompt; afterwards the pipeline draws as before."""
    before = _draw(pipe, prompt="a dog")
    with personalize.attach(pipe, folder, forget="decoder=0.5") as mine:
        inputs = mine.inputs("a dog", alpha=0.8, beta=1.2, negative_prompt="blue")
        pictures = _draw(pipe, **inputs), _draw(pipe, prompt="a dog")
    assert np.array_equal(_draw(pipe, prompt="a dog"), before) and not np.array_equal(pictures[1], before)
    return pictures


def _to(dtype):
    return lambda pipe: pipe.to(dtype)


def _layerwise(pipe):
    pipe.to(BF16)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=BF16)


def _on(places):
    def move(pipe):
        for name, device in places.items():
            getattr(pipe, name).to(device)

    return move


def _group(kind):
    def offload(pipe):
        pipe.unet.to("cpu")
        how = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        devices = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu")}
        pipe.unet.enable_group_offload(**devices, offload_type=kind, **how)

    return offload


def _compiled(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")


PREPARED = {
    "fp32": lambda pipe: None, "fp16": _to(FP16), "bf16": _to(BF16), "layerwise fp8": _layerwise,
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last), "compiled": _compiled,
    "group offload by layer": _group("leaf_level"), "group offload by block": _group("block_level"),
}  # fmt: skip


@pytest.mark.parametrize("prepared", PREPARED)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def flow_attach(folders, name, prepared):
    pipe = pipeline(name)
    PREPARED[prepared](pipe)
    reference = _attached(pipeline(name, "cpu"), folders / name)
    pictures = _attached(pipe, folders / name)
    exact = prepared not in ("fp16", "bf16", "layerwise fp8")
    assert all(np.abs(a - b).mean() < (0.5 if exact else 40) for a, b in zip(pictures, reference, strict=True))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def flow_model_offload(folders, name):
    pipe = pipeline(name, "cpu")
    pipe.enable_model_cpu_offload(device="cuda")
    reference = _attached(pipeline(name, "cpu"), folders / name)
    assert all(np.abs(a - b).mean() < 0.5 for a, b in zip(_attached(pipe, folders / name), reference, strict=True))


def flow_sequential_offload(folders):
    pipe = pipeline(device="cpu")
    pipe.enable_sequential_cpu_offload(device="cuda")
    try:
        _attached(pipe, folders / "sd1")
    except UserError as error:
        assert "pipe." in str(error), "a refusal names the call that helps"


def flow_fused_projections_are_refused(folders):
    pipe = pipeline()
    pipe.fuse_qkv_projections()
    with pytest.raises(UserError, match="unfuse_qkv_projections"):
        _attached(pipe, folders / "sd1")


def flow_moved_inside_the_block(folders):
    pipe = pipeline(device="cpu")
    with personalize.attach(pipe, folders / "sd1") as mine:
        pipe.to("cuda")
        assert _draw(pipe, **mine.inputs("a dog")).any()
