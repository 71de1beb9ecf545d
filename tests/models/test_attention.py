import pytest
import torch

from personalize.errors import UserError
from personalize.models.attention import AttentionHook, _Processor, attention_sites, hooked
from personalize.models.attention_maps import MapStore, stage_side
from tests.support.tiny import NAMES, tiny, tiny_sd1


class Reads(AttentionHook):
    """Reads maps and changes nothing: forces the explicit softmax."""

    def probs(self, p, site):
        return p * 1


class Elsewhere(AttentionHook):
    def wants(self, site):
        return site.side == 13


class Fails(AttentionHook):
    def qkv(self, q, k, v, site):
        raise RuntimeError("inside a hook")


def question(model, rows=2, height=16, width=16):
    latents = torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(0))
    return latents, 500, model.prompts(["a cat", "the red dog on snow"][:rows])


def processors(model):
    return {name: id(processor) for name, processor in model.unet.attn_processors.items()}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_identity_hook_equals_no_hook_and_explicit_softmax_equals_fused(name):
    model = tiny(name)
    asked = question(model)
    expected, before = model.predict(*asked), processors(model)
    with hooked(model.unet, [AttentionHook()]):
        identity = model.predict(*asked)
    with hooked(model.unet, [Reads()]):
        explicit = model.predict(*asked)
    assert torch.equal(identity, expected)  # the same fused kernel on the same numbers
    torch.testing.assert_close(
        explicit, expected, atol=1e-5, rtol=0
    )  # another order of fp32 sums, 16 to 70 layers deep
    assert processors(model) == before


def test_sites_say_where_they_are():
    sites = attention_sites(tiny_sd1().unet, (16, 24))
    assert len(sites) == 32 and sum(site.cross for site in sites.values()) == 16
    down = sites["down_blocks.1.attentions.0.transformer_blocks.0.attn2"]
    assert (down.place, down.level, down.cross, down.heads, down.height, down.width) == ("down", 1, True, 2, 8, 12)
    up = sites["up_blocks.3.attentions.2.transformer_blocks.0.attn1"]
    assert (up.place, up.level, up.cross, up.height, up.width) == ("up", 0, False, 16, 24)
    middle = sites["mid_block.attentions.0.transformer_blocks.0.attn2"]
    assert (middle.place, middle.level, middle.height, middle.width) == ("mid", 3, 2, 3)


def test_maps_have_the_size_their_site_says_also_for_odd_latents():
    model, store = tiny_sd1(), MapStore(cross=True)
    with torch.no_grad(), hooked(model.unet, [store]):
        model.predict(*question(model, 2, 12, 18))  # 12×18 → 6×9 → 3×5
    assert len(store.maps) == 16
    for name, site in store.sites.items():
        assert store.grid(name).shape == (2, site.heads, site.height, site.width, 77)
        torch.testing.assert_close(store.maps[name].sum(-1), torch.ones(2, site.heads, site.height * site.width))
    assert {(site.height, site.width) for site in store.sites.values()} == {(12, 18), (6, 9), (3, 5), (2, 3)}


def test_the_sixteens_are_the_stage_nearest_sixteen_with_text_on_both_paths():
    model = tiny_sd1()
    assert [stage_side(model, target) for target in (16, 7, 1)] == [16, 8, 4]
    model.unet.register_to_config(sample_size=96)  # SD 2 at 768 px
    assert stage_side(model) == 24
    xl = tiny("sdxl")
    xl.unet.register_to_config(sample_size=128)
    assert stage_side(xl) == 32


def test_store_filters_and_means():
    model = tiny_sd1()
    store = MapStore(side=8, place="up")
    with torch.no_grad(), hooked(model.unet, [store]):
        model.predict(*question(model))
        model.predict(*question(model))
    assert len(store.maps) == 3 and all(name.startswith("up_blocks.2") for name in store.maps)
    mean = store.mean()
    assert mean.shape == (2, 8, 8, 77)
    expected = torch.stack([maps.mean(1) for maps in store.maps.values()]).mean(0).view(2, 8, 8, 77)
    torch.testing.assert_close(mean, expected)
    with pytest.raises(ValueError, match="one size"):
        MapStore().mean()


def test_a_hook_may_change_keys_values_and_maps():
    model = tiny_sd1()
    asked = question(model)

    class MeanValue(AttentionHook):
        """Every token with the same weight, by giving all the mean value."""

        def wants(self, site):
            return site.cross

        def qkv(self, q, k, v, site):
            return q, k, v.mean(2, keepdim=True).expand_as(v)

    class Uniform(MeanValue):
        def qkv(self, q, k, v, site):
            return q, k, v

        def probs(self, p, site):
            return torch.full_like(p, 1 / p.shape[-1])

    with torch.no_grad():
        plain = model.predict(*asked)
        with hooked(model.unet, [MeanValue()]):
            values = model.predict(*asked)
        with hooked(model.unet, [Uniform()]):
            maps = model.predict(*asked)
    torch.testing.assert_close(values, maps, atol=1e-5, rtol=0)  # equal but for the order of fp32 sums
    assert (values - plain).abs().max() > 1e-2


def test_branches_are_seen_apart_and_only_readers_of_that_branch_pay():
    model, seen = tiny_sd1(), []

    class Look(AttentionHook):
        def qkv(self, q, k, v, site):
            seen.append((site.branch, site.step, len(q), len(k)))
            return q, k, v

    store = MapStore()
    with torch.no_grad(), hooked(model.unet, [Look(), store], step="first", branches=("null", "cond")):
        model.predict(*question(model))
    assert set(seen) == {("null", "first", 1, 1), ("cond", "first", 1, 1)}
    assert {site.branch for site in store.sites.values()} == {"cond"}
    assert all(len(maps) == 1 for maps in store.maps.values())


def test_a_hook_without_a_site_is_an_error_that_lists_the_sites():
    model = tiny_sd1()
    before = processors(model)
    with pytest.raises(UserError, match="Elsewhere matches no site.*cross 16×16 down"):
        with torch.no_grad(), hooked(model.unet, [AttentionHook(), Elsewhere()]):
            model.predict(*question(model))
    assert processors(model) == before


def test_no_trace_after_an_exception():
    model = tiny_sd1()
    asked, before = question(model), processors(model)
    with torch.no_grad():
        expected = model.predict(*asked)
        with pytest.raises(RuntimeError, match="inside a hook"), hooked(model.unet, [Fails()]):
            model.predict(*asked)
        assert processors(model) == before and not model.unet._forward_pre_hooks
        assert torch.equal(model.predict(*asked), expected)


def test_contexts_inside_one_another_and_foreign_adapters_are_refused():
    model = tiny_sd1()
    with hooked(model.unet, [Reads()]), pytest.raises(ValueError, match="inside one another"):
        with hooked(model.unet, [Reads()]):
            pass
    attention = model.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    attention.set_processor(torch.nn.Identity())
    with pytest.raises(UserError, match="Identity owns"), hooked(model.unet, [Reads()]):
        pass
    assert isinstance(attention.processor, torch.nn.Identity)


def test_capture_under_gradient_checkpointing_stores_once_with_the_same_gradient():
    """The backward pass comes after the context, as in the training loop. 1e-6: recomputation repeats the sums."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny_sd1()
        weight = model.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1").to_q.weight
        weight.requires_grad_(True)
        model.unet.train()
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
        original = vars(model.unet.down_blocks[0]).get("_gradient_checkpointing_func")
        store = MapStore(keep_graph=True)
        with hooked(model.unet, [store]):
            output = model.predict(*question(model))
        loss = output.square().mean() + sum(maps[..., 2].square().mean() for maps in store.maps.values())
        loss.backward()
        assert len(store.maps) == 16
        assert vars(model.unet.down_blocks[0]).get("_gradient_checkpointing_func") is original
        assert {type(one).__name__ for one in model.unet.attn_processors.values()} == {"AttnProcessor2_0"}
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)
    assert gradients[0].abs().max() > 0


def test_without_keep_graph_maps_are_detached():
    model, store = tiny_sd1(), MapStore()
    model.unet.conv_in.weight.requires_grad_(True)
    with hooked(model.unet, [store]):
        model.predict(*question(model))
    assert not any(maps.requires_grad for maps in store.maps.values())


def test_stock_pipelines_can_be_watched():
    model, store = tiny_sd1(), MapStore(side=16)
    pipe = model.pipeline()
    pipe.set_progress_bar_config(disable=True)
    with hooked(model.unet, [store]):
        pipe("a cat", num_inference_steps=2, output_type="latent")
    assert all(len(maps) == 2 for maps in store.maps.values())  # a foreign loop's two passes are not kept apart


def test_in_fp16_the_explicit_softmax_scales_before_the_product():
    """Queries and keys of 150 with 8 values a head: 180,000 is above fp16's 65,504; scaled it is 63,600."""
    attention = next(module for name, module in tiny_sd1().unet.named_modules() if name.endswith("attn1"))
    attention.scale = 8**-0.5
    q, k = torch.full((2, 1, 2, 4, 8), 150.0, dtype=torch.float16)
    processor = _Processor(None)
    processor.hooks = [Reads()]
    site = next(iter(attention_sites(tiny_sd1().unet).values()))
    found = processor._attend(attention, q, k, torch.ones_like(k), None, site)
    assert torch.equal(found, torch.ones_like(found))
