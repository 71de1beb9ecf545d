"""Adapter: a folder that is whole or absent, the same bytes each time, and refused where it does not belong."""

import errno
import json
import math
import os
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from personalize.adapters.adapter import Adapter
from personalize.adapters.adapter_files import check_target, kohya_file_name, picture_name
from personalize.errors import UserError
from personalize.formats.integrity import changed_files
from personalize.formats.verification import verify_folder
from personalize.io import atomic
from personalize.io.tensor_files import read_tensors, tensor_bytes
from tests.support.lora_states import paths, predict, random_lora
from tests.support.tiny import tiny

DIFFUSERS, SOURCE, MANIFEST, CARD = (
    "pytorch_lora_weights.safetensors", "source_embedding.safetensors", "adapter.json", "README.md",
)  # fmt: skip


def make(model, seed=0, **info):
    width = model.unet.config.cross_attention_dim
    source = {"embeds": torch.linspace(-1, 1, 77 * width).reshape(1, 77, width)}
    if model.family == "sdxl":
        source["pooled"] = torch.ones(1, 40)
    about = {"base": {**model.identity, "prediction_type": model.prediction_type}, "caption": "a photo of my cat"}
    lora = random_lora(paths(model.unet, lambda path: path.endswith(("attn2.to_k", ".conv1"))), seed=seed)
    return Adapter(lora, 4, 6.0, source, about | {"seed": 3, "config": {"rank": 4}} | info)


@pytest.fixture(scope="module")
def sd1():
    return tiny("sd1")


def pictures():
    return {"source": Image.new("RGB", (8, 8), "red"), "reconstruction": Image.new("RGB", (8, 8), "blue")}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_save_and_load_give_the_adapter_back(tmp_path, name):
    adapter = make(tiny(name))
    folder = adapter.save(tmp_path / "my cat", pictures=pictures())
    expected = {DIFFUSERS, SOURCE, MANIFEST, CARD, "my_cat.safetensors", "source.png", "reconstruction.png"}
    assert set(contents(folder)) == expected
    found = Adapter.load(folder)
    assert (found.rank, found.alpha, found.info) == (adapter.rank, adapter.alpha, adapter.info)
    for ours, theirs in ((adapter.lora, found.lora), (adapter.source, found.source)):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert found.family == tiny(name).family


def test_forgedit_c31_side_car_has_its_shape_precision_and_base(tmp_path, sd1):
    folder = make(sd1).save(tmp_path / "a")
    content = read_tensors(folder / SOURCE)
    assert content.tensors["embeds"].shape == (1, 77, 32) and content.tensors["embeds"].dtype == torch.float32
    assert content.metadata["sha256"] == sd1.identity["sha256"] and content.metadata["family"] == "sd1"


def test_forgedit_c31_wrong_family_or_base_is_refused_naming_both(sd1):
    adapter = make(sd1)
    with pytest.raises(UserError, match=r"tiny-sd1 \(sd1\), not for tiny-sdxl \(sdxl\)"), adapter.apply(tiny("sdxl")):
        pass
    other = tiny("sd1")
    with torch.no_grad():
        other.unet.conv_out.weight.neg_()
    with pytest.raises(UserError, match="made for tiny-sd1"), adapter.apply(other):
        pass
    with adapter.apply(other, any_base=True):
        pass


def test_equal_adapters_give_equal_bytes(tmp_path, sd1):
    first = make(sd1).save(tmp_path / "a" / "x", pictures=pictures())
    adapter = make(sd1)
    turned = replace(adapter, lora=dict(reversed(adapter.lora.items())), info=dict(reversed(adapter.info.items())))
    assert contents(turned.save(tmp_path / "b" / "x", pictures=pictures())) == contents(first)
    assert contents(Adapter.load(first).save(tmp_path / "c" / "x", pictures=pictures())) == contents(first)


def test_apply_changes_the_prediction_and_leaves_no_trace_also_when_the_body_raises(sd1):
    before, names = predict(sd1), [name for name, _ in sd1.unet.named_modules()]
    with make(sd1).apply(sd1):
        assert not torch.equal(predict(sd1), before)
    with pytest.raises(ZeroDivisionError), make(sd1).apply(sd1):
        raise ZeroDivisionError
    assert torch.equal(predict(sd1), before) and [name for name, _ in sd1.unet.named_modules()] == names


def test_forgedit_c30_stock_diffusers_reads_the_folder_as_we_do(tmp_path, sd1):
    adapter = make(sd1)
    folder = adapter.save(tmp_path / "a", pictures=pictures())
    with adapter.apply(sd1):
        expected = predict(sd1)
    for name in (None, DIFFUSERS, "a.safetensors"):  # a folder alone finds the standard name
        pipe = sd1.pipeline()
        pipe.load_lora_weights(folder, **({} if name is None else {"weight_name": name}))
        found = predict(sd1)
        pipe.unload_lora_weights()
        # the same LoRA branches; baking alpha / rank = 1.5 into `lora_up` rounds each entry once more in fp32
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_new_save_replaces_what_is_ours_and_keeps_the_rest(tmp_path, sd1):
    folder = tmp_path / "run"
    (folder / "checkpoint-5").mkdir(parents=True)
    (folder / "checkpoint-5" / "state").write_bytes(b"kept")
    make(sd1).save(folder, pictures=pictures())
    (folder / "notes.txt").write_bytes(b"kept")
    replace(make(sd1, seed=1), source=None).save(folder, pictures={"other": Image.new("RGB", (8, 8))})
    assert set(contents(folder)) == {DIFFUSERS, MANIFEST, CARD, "run.safetensors", "other.png", "notes.txt"}
    assert (folder / "checkpoint-5" / "state").read_bytes() == b"kept"
    assert Adapter.load(folder).source is None


def test_files_of_another_origin_are_not_overwritten(tmp_path, sd1):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    for attempt in (lambda: check_target(tmp_path / "project"), lambda: make(sd1).save(tmp_path / "project")):
        with pytest.raises(UserError, match="README.md, which no training wrote"):
            attempt()
    assert contents(tmp_path / "project") == {"README.md": b"mine"}
    check_target(tmp_path / "new")


@pytest.mark.parametrize("before", [False, True])
def test_a_full_disk_at_any_byte_leaves_the_old_adapter_or_none(tmp_path, monkeypatch, sd1, before):
    adapter, folder = make(sd1), tmp_path / "a"
    if before:
        make(sd1, seed=1).save(folder)
    old = contents(folder) if before else None
    total = sum(map(len, contents(adapter.save(tmp_path / "measure")).values()))
    create = atomic.create_file
    for position in range(60):
        left = [position * total // 60]

        def full(path, left=left):
            stream = create(path)
            write = stream.write

            class Stream:
                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    stream.close()

                def __getattr__(self, name):
                    return getattr(stream, name)

                def write(self, data):
                    write(data[: max(left[0], 0)])
                    left[0] -= len(data)
                    if left[0] < 0:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            return Stream()

        monkeypatch.setattr(atomic, "create_file", full)
        with pytest.raises(UserError, match="No space left on device"):
            adapter.save(folder)
        assert (contents(folder) if folder.exists() else None) == old
        assert {path.name for path in tmp_path.iterdir()} == ({"a", "measure"} if before else {"measure"})
    monkeypatch.setattr(atomic, "create_file", create)
    assert contents(adapter.save(folder)).keys() == {DIFFUSERS, SOURCE, MANIFEST, CARD, "a.safetensors"}


@pytest.mark.parametrize("missing", [DIFFUSERS, SOURCE, MANIFEST])
def test_missing_files(tmp_path, sd1, missing):
    folder = make(sd1).save(tmp_path / "a")
    (folder / missing).unlink()
    message = "lacks adapter.json, which training wrote" if missing == MANIFEST else f"{missing} does not exist"
    with pytest.raises(UserError, match=message):
        Adapter.load(folder)


def edit_manifest(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "update personalize"),
        ({"rank": "4"}, "damaged: expected int, got str - at rank"),
        ({"rank": 8}, "not of one adapter"),
        ({"alpha": 1}, "not of one adapter"),
        ({"base": 3}, "damaged: expected object, got int - at base"),
        ({"tensors": {}}, "was not in the adapter"),
        ({"source_tensors": {"embeds": "0"}}, "tensor embeds is not what was saved"),
    ],
)
def test_damaged_manifests(tmp_path, sd1, changes, message):
    folder = make(sd1).save(tmp_path / "a")
    edit_manifest(folder, **changes)
    with pytest.raises(UserError, match=message):
        Adapter.load(folder)


def test_a_changed_tensor_a_pickle_and_a_missing_folder(tmp_path, sd1):
    folder = make(sd1).save(tmp_path / "a")
    content = read_tensors(folder / DIFFUSERS)
    next(iter(content.tensors.values())).add_(1e-6)
    (folder / DIFFUSERS).write_bytes(tensor_bytes(content.tensors, content.metadata))
    with pytest.raises(UserError, match="is not what was saved"):
        Adapter.load(folder)
    torch.save({}, folder / DIFFUSERS)
    with pytest.raises(UserError, match="pickle"):
        Adapter.load(folder)
    with pytest.raises(UserError, match="nothing does not exist"):
        Adapter.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 3}, "contradict"),
        ({"alpha": 0.0}, "contradict"),
        ({"source": {"embeds": torch.zeros(2, 77, 32)}}, r"expected embeds \(1, l, d\)"),
        ({"source": {"embeds": torch.full((1, 77, 32), float("inf"))}}, "not finite"),
        ({"source": {}}, "expected embeds"),
        ({"info": {}}, "family"),
        ({"lora": {}}, "no LoRA module"),
    ],
)
def test_an_adapter_that_contradicts_itself_is_not_saved(tmp_path, sd1, changes, message):
    with pytest.raises(UserError, match=message):
        replace(make(sd1), **changes).save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf, 1e30, "1", None, True])
def test_an_alpha_that_is_no_finite_number_is_refused_where_an_adapter_is_made(sd1, alpha):
    with pytest.raises(UserError, match="alpha is"):
        replace(make(sd1), alpha=alpha)


@pytest.mark.parametrize("rank", [0, -1, 2.0, math.nan, "4", None, True])
def test_a_rank_that_is_no_count_is_refused_where_an_adapter_is_made(sd1, rank):
    with pytest.raises(UserError, match="^rank is "):
        replace(make(sd1), rank=rank)


def test_names():
    assert [kohya_file_name(name) for name in ("my cat", "a.b-c", "...", "été", "source_embedding")] == [
        "my_cat.safetensors",
        "a.b-c.safetensors",
        "adapter.safetensors",
        "été.safetensors",
        "source_embedding_lora.safetensors",
    ]
    assert picture_name("before") == picture_name("before.png") == "before.png"
    with pytest.raises(UserError):
        picture_name("../before")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_utf_8_are_saved_with_a_replacement_character(tmp_path, sd1):
    """As of a folder that another system has made: the training was done and then could not be saved."""
    folder = make(sd1, picture="p\udcff.png").save(os.fsdecode(bytes(tmp_path) + b"/m\xe9"), pictures=pictures())
    assert verify_folder(folder).ok and changed_files(folder)[0] == []
    assert Adapter.load(folder).info["picture"] == "p\ufffd.png"


def test_half_precision_twin(tmp_path, sd1):
    folder = make(sd1).save(tmp_path / "a", kohya_dtype=torch.float16)
    assert {tensor.dtype for tensor in read_tensors(folder / "a.safetensors").tensors.values()} == {torch.float16}
