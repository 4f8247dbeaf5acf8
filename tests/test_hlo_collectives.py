"""What exchanges are for: by names, by hand-made programs, and of whole steps."""

from dataclasses import replace

import jax
import pytest
from test_plan import quickstart

from clip_lite_jax.apps.plan_step import abstract_step
from clip_lite_jax.config import MeshConfig, NegativesConfig, ObjectiveConfig
from clip_lite_jax.hlo import traffic
from clip_lite_jax.hlo_collectives import Collective, collectives, purpose_of
from clip_lite_jax.sharding import build_mesh

BACKWARD = "jit(step)/transpose(jvp(DualEncoder))"


@pytest.mark.parametrize(
    ("kind", "names", "purpose"),
    [
        ("all-reduce", [f"{BACKWARD}/image_encoder/norm/reduce_sum"], "gradients of image_encoder"),
        ("reduce-scatter", [f"{BACKWARD}/critic.project_text/dot"], "gradients of critic"),
        (
            "all-reduce",
            ["jit(step)/jvp(DualEncoder)/image_encoder/bn"],
            "statistics of image_encoder",
        ),
        ("all-gather", ["state.params['text_prior']['x']"], "parameters of text_prior"),
        (
            "all-gather",
            ["jit(step)/jvp()/sharding_constraint", "state.params['visual_critic']['x']"],
            "parameters of visual_critic",
        ),
        ("all-gather", ["jit(step)/jvp(DualEncoder)/critic/dot"], "activations of critic"),
        ("all-to-all", ["jit(step)/jvp(negatives)/shard_map/all_to_all"], "negatives"),
        # What the critic made is moved, and no parameter of it.
        (
            "all-gather",
            ["jit(step)/jvp(negatives)/shard_map/all_gather", "jit(step)/jvp()/critic.project"],
            "negatives",
        ),
        (
            "reduce-scatter",
            ["jit(step)/transpose(jvp(negatives))/shard_map/critic.matrix/dot_general"],
            "gradients of negatives",
        ),
        (
            "all-reduce",
            ["jit(step)/transpose(jvp(negatives))/DualEncoder.pairs/critic.pairs/reduce_sum"],
            "gradients of critic",
        ),
        (
            "all-reduce",
            ["jit(step)/transpose(jvp(negatives))/shard_map/psum"],
            "gradients of critic",
        ),
        ("all-reduce", ["jit(step)/jvp()/reduce_sum"], "sums"),
        ("collective-permute", ["jit(step)/jvp()/roll"], "other"),
        ("all-reduce", [], "other"),
    ],
)
def test_purposes_by_name(kind: str, names: list[str], purpose: str) -> None:
    assert purpose_of(kind, names) == purpose


TPU_PROGRAM = """
HloModule made_by_hand

%add (left: f32[], right: f32[]) -> f32[] {
  %left = f32[]{:T(128)} parameter(0)
  %right = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%left, %right)
}

%dots (in: f32[8,16]) -> f32[8,16] {
  %in = f32[8,16]{1,0} parameter(0)
  ROOT %dot = f32[8,16]{1,0} negate(%in), metadata={op_name="BACK/text_encoder/dot_general"}
}

%all-reduce-scatter.1 (a: f32[8,16], b: f32[8,16]) -> (f32[4,16], f32[4,16]) {
  %a = f32[8,16]{1,0:T(8,128)} parameter(0)
  %b = f32[8,16]{1,0:T(8,128)} parameter(1)
  ROOT %sum = (f32[8,16]{1,0}, f32[8,16]{1,0}) all-reduce(%a, %b), replica_groups={{0,1}}, \
to_apply=%add
}

ENTRY %main (p: f32[4,16], x: f32[8,16], y: f32[]) -> f32[8,16] {
  %p = f32[4,16]{1,0} parameter(0), metadata={op_name="state.params[\\'critic\\'][\\'kernel\\']"}
  %x = f32[8,16]{1,0} parameter(1)
  %y = f32[] parameter(2)
  %copy = f32[4,16]{1,0} copy(%p)
  %gather = f32[8,16]{1,0} all-gather(%copy), replica_groups=[1,2]<=[2], dimensions={0}
  %fused = f32[8,16]{1,0} fusion(%x), kind=kLoop, calls=%dots
  %other = f32[8,16]{1,0} negate(%x), metadata={op_name="BACK/image_encoder/dot_general"}
  %scatter = (f32[4,16]{1,0}, f32[4,16]{1,0}) fusion(%fused, %other), kind=kCustom, \
calls=%all-reduce-scatter.1, metadata={op_name="BACK/text_encoder/dot_general"}
  %mine = f32[4,16]{1,0} get-tuple-element(%scatter), index=1
  %edge = f32[1,16]{1,0} slice(%mine), slice={[3:4], [0:16]}
  %halo = f32[1,16]{1,0} collective-permute(%edge), channel_id=3, source_target_pairs={{0,1}}
  %both = (f32[8,16]{1,0}, f32[]) all-reduce(%x, %y), replica_groups={{0,1}}, to_apply=%add
  %first = f32[8,16]{1,0} get-tuple-element(%both), index=0, \
metadata={op_name="BACK/critic.pairs/dot_general"}
  %second = f32[] get-tuple-element(%both), index=1, metadata={op_name="jit(step)/reduce_sum"}
  ROOT %end = f32[8,16]{1,0} add(%first, %gather)
}
""".replace("BACK", BACKWARD)


def test_operands_are_followed_to_what_has_a_name() -> None:
    """Through copies, fusions and their bodies, elements of tuples and scattered sums."""
    own = 8 * 16 * 4
    assert collectives(TPU_PROGRAM) == [
        Collective("all-reduce", "gradients of critic", 1, own),
        Collective("all-gather", "parameters of critic", 1, own / 2),
        Collective("reduce-scatter", "gradients of image_encoder", 1, own / 2),
        Collective("reduce-scatter", "gradients of text_encoder", 1, own / 2),
        Collective("collective-permute", "gradients of image_encoder", 1, 16 * 4),
        Collective("all-reduce", "sums", 1, 4),
    ]


SHUFFLE = NegativesConfig(name="shuffle", sides="both", lanes=2)
GATHER = NegativesConfig(name="all", sides="both", implementation="gather")


@pytest.mark.parametrize(
    ("negatives", "objective", "fsdp"),
    [(SHUFFLE, "jsd", 1), (GATHER, "infonce", 1), (SHUFFLE, "jsd", "all")],
    ids=["one negative", "all negatives", "parameters in pieces"],
)
def test_a_whole_step(negatives: NegativesConfig, objective: str, fsdp: int | str) -> None:
    """Everything that is sent has a purpose, and bytes are those that formulae say."""
    config = replace(
        quickstart(),
        negatives=negatives,
        objective=ObjectiveConfig(name=objective),
        mesh=MeshConfig(fsdp=fsdp, min_size=1),  # type: ignore[arg-type]
    )
    step = abstract_step(config, build_mesh(jax.devices()[:2], config.mesh))
    program = step.lowered.compile().as_text()
    found = {(c.kind, c.purpose): c.sent for c in collectives(program)}
    assert sum(found.values()) == pytest.approx(sum(traffic(program).sent.values()))
    assert not {purpose for _, purpose in found} & {"other", "activations of critic"}

    def of(purpose: str) -> float:
        return sum(size for (_, what), size in found.items() if what == purpose)

    own = 8 * 16 * 4  # bytes of a device's embeddings, images or texts
    if objective == "jsd":  # of both sides a half leaves the device, and comes back as gradients
        assert found["all-to-all", "gradients of negatives"] == 2 * own / 2
        assert own <= found["all-to-all", "negatives"] < 1.5 * own
    else:
        assert 2 * own <= found["all-gather", "negatives"] < 2.5 * own
        assert found["reduce-scatter", "gradients of negatives"] == 2 * own
    parameters = step.state.params["image_encoder"]
    whole = 4 * sum(x.size for x in jax.tree.leaves(parameters))
    assert of("gradients of image_encoder") == pytest.approx(whole, rel=0.01)  # 2 · 1/2 of it
    gathered = of("parameters of image_encoder")
    assert gathered == (0 if fsdp == 1 else pytest.approx(whole / 2, rel=0.01))
