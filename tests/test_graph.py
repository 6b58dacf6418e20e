"""Edges inferred from what the blocks of each stage read and write."""

from collections.abc import Sequence

import pytest

from disagg_ray.errors import GraphError
from disagg_ray.graph import Edge, StagePorts, build_graph


def ports(stage: str, required: str = "", outputs: str = "", optional: str = "") -> StagePorts:
    return StagePorts(stage, frozenset(required.split()), frozenset(optional.split()), frozenset(outputs.split()))


ENCODER = ports("encoder", "prompt", "prompt_embeds negative_prompt_embeds", "negative_prompt")
TRANSFORMER = ports("transformer", "prompt_embeds height", "latents", "negative_prompt_embeds latents")
DECODER = ports("decoder", "latents", "videos", "output_type")
CHAIN = (ENCODER, TRANSFORMER, DECODER)

EYE = ports("eye", "image", "image_embeds")
CONDITION = ports("condition", "image last_image", "condition_latents")
IMAGE_TRANSFORMER = ports("transformer", "prompt_embeds image_embeds condition_latents", "latents", "latents")


def test_three_stages_form_a_chain_in_whatever_order_they_are_named() -> None:
    graph = build_graph([DECODER, TRANSFORMER, ENCODER])
    assert graph.order == ("encoder", "transformer", "decoder")
    assert graph.last == "decoder"
    assert graph.edges == (
        Edge("encoder", "transformer", ("negative_prompt_embeds", "prompt_embeds")),
        Edge("transformer", "decoder", ("latents",)),
    )


def test_a_stage_pulls_and_publishes_only_what_travels() -> None:
    graph = build_graph(CHAIN)
    assert graph.inputs("encoder") == ()
    assert graph.inputs("transformer") == graph.outputs("encoder") == ("negative_prompt_embeds", "prompt_embeds")
    assert graph.inputs("decoder") == graph.outputs("transformer") == ("latents",)
    assert graph.outputs("decoder") == ()


def test_latents_are_kept_and_not_what_is_made_of_them() -> None:
    parts = [ports(f"decoder_{k}", "latents", f"tiles_{k}") for k in (1, 2)]
    graph = build_graph([*CHAIN[:2], *parts, ports("join", "tiles_1 tiles_2", "videos")])
    assert graph.kept == build_graph(CHAIN).kept == "transformer"
    assert set(graph.consumers("transformer")) == set(graph.producers("join")) == {"decoder_1", "decoder_2"}


def test_encoders_apart_feed_the_transformer_each() -> None:
    graph = build_graph([ENCODER, EYE, CONDITION, IMAGE_TRANSFORMER, DECODER])
    assert set(graph.producers("transformer")) == {"encoder", "eye", "condition"}
    assert graph.consumers("eye") == ("transformer",)
    assert graph.order[-2:] == ("transformer", "decoder")


def test_the_request_s_images_go_to_the_stages_that_read_them() -> None:
    graph = build_graph([ENCODER, EYE, CONDITION, IMAGE_TRANSFORMER, DECODER])
    assert graph.image_inputs("eye") == ("image",)
    assert graph.image_inputs("condition") == ("image", "last_image")
    assert graph.image_inputs("transformer") == ()


def test_one_tensor_may_have_several_readers() -> None:
    graph = build_graph([ENCODER, TRANSFORMER, ports("decoder", "latents prompt_embeds", "videos")])
    assert graph.consumers("encoder") == ("transformer", "decoder")
    assert graph.inputs("decoder") == ("prompt_embeds", "latents")


def test_a_fused_stage_needs_no_edge() -> None:
    fused = ports("all", "prompt", "prompt_embeds latents videos", "negative_prompt latents prompt_embeds")
    graph = build_graph([fused])
    assert (graph.order, graph.edges, graph.last, graph.kept) == (("all",), (), "all", None)


def test_an_optional_input_without_a_producer_is_left_out() -> None:
    graph = build_graph([ports("decoder", "", "videos", "latents")])
    assert graph.inputs("decoder") == ()


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ((TRANSFORMER, DECODER), ("stages.transformer.blocks", "'prompt_embeds'", "no producer")),
        ((ENCODER, TRANSFORMER), ("exactly one", "'decode'", "[]")),
        ((*CHAIN, ports("second", "latents", "videos")), ("exactly one", "['decoder', 'second']")),
        ((*CHAIN, ports("other", "prompt", "prompt_embeds")), ("encoder", "other", "'prompt_embeds'", "keep one")),
        ((ports("a", "y", "x"), ports("b", "x", "y videos")), ("cycle in the stage graph", "a -> b -> a")),
        ((), ("exactly one", "[]")),
    ],
    ids=["missing producer", "no last stage", "two last stages", "two producers", "cycle", "no stage"],
)
def test_what_is_no_graph_is_refused_by_name(stages: Sequence[StagePorts], words: Sequence[str]) -> None:
    with pytest.raises(GraphError) as caught:
        build_graph(stages)
    assert all(word in str(caught.value) for word in words), str(caught.value)
