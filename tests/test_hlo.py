"""What is read from compiled programs: traffic, FLOPs by hand formulae, bytes of memory."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax
from jax.sharding import PartitionSpec

from clip_lite_jax.hlo import matmul_flops, size_in_bytes, traffic
from clip_lite_jax.hlo_memory import bytes_moved
from clip_lite_jax.sharding import build_mesh

RING = [(i, (i + 1) % 4) for i in range(4)]


def program_of(body: Any, *shapes: tuple[int, ...]) -> str:
    """The text of `body`, which runs on each of four devices."""
    mesh = build_mesh(jax.devices()[:4])
    rows = PartitionSpec("data")
    there = jax.shard_map(body, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(there).lower(*arguments).compile().as_text()


def test_collectives_of_a_loop_count_as_often_as_it_runs() -> None:
    def body(x: Array) -> Array:
        def step(x: Array, _: None) -> tuple[Array, None]:
            return jnp.sin(lax.ppermute(x, "data", RING)), None

        return lax.scan(step, x, None, length=3)[0]

    found = traffic(program_of(body, (20, 7)))
    assert found.sent["collective-permute"] == 3 * 5 * 7 * 4
    assert found.count["collective-permute"] == 3
    assert sum(found.sent.values()) == found.sent["collective-permute"]


def test_what_leaves_a_device_by_kind() -> None:
    def body(x: Array) -> Array:  # [4, 8] on each of four devices
        everyone = jnp.cos(lax.all_gather(x, "data", axis=0, tiled=True))
        mine = lax.psum_scatter(everyone, "data", scatter_dimension=0, tiled=True)
        dealt = lax.all_to_all(jnp.sin(mine), "data", 0, 0, tiled=True)
        return dealt + lax.psum(jnp.cos(dealt), "data")

    own = 4 * 8 * 4
    assert traffic(program_of(body, (16, 8))).sent == {
        "all-gather": 3 * own,
        "all-to-all": own * 3 / 4,
        "collective-permute": 0,
        "reduce-scatter": 3 * own,
        "all-reduce": 2 * own * 3 / 4,
    }


def test_products_of_a_loop_count_as_often_as_it_runs() -> None:
    def body(x: Array, y: Array) -> Array:
        return lax.scan(lambda x, _: (jnp.tanh(x @ y), None), x, None, length=5)[0]

    assert matmul_flops(program_of(body, (64, 32), (128, 32))) == 5 * 2 * 16 * 32 * 32


def test_a_loop_of_unknown_length_is_refused() -> None:
    def body(x: Array) -> Array:
        return lax.while_loop(
            lambda x: lax.pmax(jnp.max(x), "data") < 9,
            lambda x: lax.ppermute(2 * x, "data", RING),
            x,
        )

    with pytest.raises(ValueError, match="a loop whose length the program does not state"):
        traffic(program_of(body, (4, 4)))


TPU_PROGRAM = """
HloModule made_by_hand

%below (p: (s32[], bf16[8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%n, %limit), direction=LT
}

%body (p.1: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %n.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=1
  %start = (bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, bf16[8,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %done = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%start)
  ROOT %t = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) tuple(%n.1, %done)
}

%add (left: f32[], right: f32[]) -> f32[] {
  %left = f32[]{:T(128)} parameter(0)
  %right = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%left, %right)
}

%all-reduce-scatter (input: f32[8,16]) -> f32[4,16] {
  %input = f32[8,16]{1,0:T(8,128)} parameter(0)
  ROOT %sum = f32[8,16]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1}}, to_apply=%add
}

%first (a: bf16[8,16]) -> bf16[16,16] {
  %a = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[16,16]{1,0} all-gather(%a), channel_id=10, replica_groups=[1,2]<=[2], \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%second (b: bf16[8,16]) -> bf16[16,16] {
  %b = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %h = bf16[16,16]{1,0} all-gather(%b), channel_id=10, replica_groups=[1,2]<=[2], \
dimensions={0}, frontend_attributes={chain_id="0"}
}

ENTRY %main (x: bf16[8,16], y: f32[8,16]) -> f32[8,8] {
  %x.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[8,16]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %both = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%zero, %x.1)
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0}) while(%both), condition=%below, body=%body
  %fusion = bf16[16,16]{1,0} fusion(%x.1), kind=kCustom, calls=%first
  %fusion.1 = bf16[16,16]{1,0} fusion(%x.1), kind=kCustom, calls=%second
  %fusion.2 = f32[4,16]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
  ROOT %convolution = f32[8,8]{1,0:T(8,128)} convolution(%y, %y), dim_labels=bf_oi->bf
}
"""


def test_programs_for_tpus() -> None:
    """Loops without a stated length, exchanges in several pieces, sums that are scattered."""
    found = traffic(TPU_PROGRAM)
    assert found.count == {
        "all-gather": 1,
        "all-to-all": 0,
        "collective-permute": 6,
        "reduce-scatter": 1,
        "all-reduce": 0,
    }
    assert found.sent["collective-permute"] == 6 * 8 * 16 * 2
    assert found.sent["all-gather"] == 8 * 16 * 2
    assert found.sent["reduce-scatter"] == 8 * 16 * 4 / 2
    assert matmul_flops(TPU_PROGRAM) == 2 * 8 * 8 * 16


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[3,5]", 60),
        ("pred[7]", 7),
        ("s32[]", 4),
        ("(bf16[2,2], u8[3])", 11),
        ("f8e4m3fn[6]", 6),
    ],
)
def test_bytes_of_a_shape(shape: str, size: int) -> None:
    assert size_in_bytes(shape) == size


# --- Convolutions ---------------------------------------------------------------------------------


def convolution(image: tuple[int, ...], kernel: tuple[int, ...], **options: Any) -> list[int]:
    """FLOPs of a convolution, and of it with its gradient by the image and by the kernel."""

    def forward(x: Array, k: Array) -> Array:
        return lax.conv_general_dilated(x, k, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

    def squares(x: Array, k: Array) -> Array:
        return jnp.sum(forward(x, k) ** 2)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (image, kernel)]
    functions = (forward, jax.grad(squares), jax.grad(squares, argnums=1))
    return [matmul_flops(jax.jit(f).lower(*shapes).compile().as_text()) for f in functions]


@pytest.mark.parametrize(
    ("image", "kernel", "options", "products"),
    [
        # Of a kernel of three on a side of n with a border, two places lie on the border.
        (
            (2, 9, 8, 3),
            (3, 3, 3, 5),
            {"padding": "SAME"},
            2 * 3 * 5 * (3 * 9 - 2) * (3 * 8 - 2),
        ),
        (
            (2, 9, 8, 3),
            (3, 3, 3, 5),
            {"padding": "VALID", "window_strides": (2, 2)},
            2 * 3 * 5 * (3 * 3) * (4 * 3),
        ),
        # The patches of a vision transformer.
        (
            (2, 8, 8, 3),
            (4, 4, 3, 5),
            {"padding": "VALID", "window_strides": (4, 4)},
            2 * 3 * 5 * (4 * 4) * (2 * 2),
        ),
        # A kernel with holes spans five.
        (
            (2, 9, 9, 3),
            (3, 3, 3, 5),
            {"padding": "VALID", "rhs_dilation": (2, 2)},
            2 * 3 * 5 * (3 * 3) * (5 * 5),
        ),
        (
            (2, 9, 9, 4),
            (3, 3, 2, 6),
            {"padding": "VALID", "feature_group_count": 2},
            2 * (4 // 2) * 6 * (3 * 3) * (7 * 7),
        ),
        (
            (4, 9, 9, 3),
            (3, 3, 3, 6),
            {"padding": "VALID", "batch_group_count": 2},
            (4 // 2) * 3 * 6 * (3 * 3) * (7 * 7),
        ),
    ],
    ids=["border", "strides", "patches", "holes", "groups", "groups of the batch"],
)
def test_convolutions_and_their_gradients(
    image: tuple[int, ...], kernel: tuple[int, ...], options: dict[str, Any], products: int
) -> None:
    """Each gradient has the products of the convolution, whatever form the compiler gives it."""
    options = {"window_strides": (1, 1), **options}
    assert convolution(image, kernel, **options) == [2 * products, 4 * products, 4 * products]


def program_of_one(instruction: str, *operands: str) -> str:
    given = [f"  %p{n} = {shape} parameter({n})" for n, shape in enumerate(operands)]
    return "\n".join(
        ["ENTRY %main (p: s32[]) -> s32[] {", *given, f"  ROOT %r = {instruction}", "}"]
    )


def test_a_batch_of_products_on_tpus() -> None:
    """Written as a convolution whose window, dilated, meets one row of the batch at a time."""
    product = (
        "f32[6,4,5]{2,1,0:T(8,128)S(1)} convolution(%p0, %p1), "
        "window={size=6 stride=5 pad=0_0 lhs_dilate=6}, dim_labels=0bf_0io->0bf"
    )
    program = program_of_one(product, "f32[6,4,7]{2,1,0}", "f32[6,7,5]{2,1,0}")
    assert matmul_flops(program) == 2 * 6 * 4 * 5 * 7


CUDNN = (
    "(f32[{result}]{{3,2,1,0}}, u8[64]{{0}}) custom-call(%p0, %p1), "
    "window={{size=3x3 stride=2x2}}, "
    'dim_labels=b01f_01io->b01f, custom_call_target="__cudnn${target}"'
)
CUBLAS = (
    '(f32[8,5]{1,0}, s8[64]{0}) custom-call(%p0, %p1), custom_call_target="__cublas$gemm", '
    'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
)


def test_libraries_of_gpus() -> None:
    """As XLA writes their calls; not from a GPU, of which there was none."""
    image, kernel, result = "f32[2,9,9,3]", "f32[3,3,3,5]", "f32[2,4,4,5]"
    roles = {
        "convForward": (image, kernel, "2,4,4,5"),
        "convBackwardInput": (result, kernel, "2,9,9,3"),
        "convBackwardFilter": (image, result, "3,3,3,5"),
    }
    for target, (one, other, shape) in roles.items():
        call = CUDNN.format(result=shape, target=target)
        assert matmul_flops(program_of_one(call, one, other)) == 2 * 2 * 3 * 5 * 9 * 16, target
    assert matmul_flops(program_of_one(CUBLAS, "f32[8,7]", "f32[7,5]")) == 2 * 8 * 5 * 7


# --- Main memory ----------------------------------------------------------------------------------


def moved(function: Any, *shapes: tuple[int, ...]) -> int:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return bytes_moved(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_fusion_moves_what_goes_in_and_out() -> None:
    assert moved(lambda x, y: jnp.sin(x) * y + 1, (64, 32), (64, 32)) == 3 * 64 * 32 * 4


def test_a_loop_reads_of_its_inputs_what_it_slices() -> None:
    def layers(x: Array, weights: Array) -> Array:
        return lax.scan(lambda x, w: (jnp.sin(x) * w, None), x, weights)[0]

    own = 1000 * 4
    found = moved(layers, (1000,), (50, 1000))
    # The state is read and written and a row read, fifty times; the counter is small.
    assert 50 * 3 * own <= found <= 1.1 * 50 * 3 * own


def test_what_lies_on_the_chip_is_not_moved() -> None:
    shapes = ("f32[64,32]{1,0:T(8,128)S(1)}", "f32[64,32]{1,0:T(8,128)}")
    product = "f32[64,64]{1,0:T(8,128)S(1)} convolution(%p0, %p1), dim_labels=bf_oi->bf"
    assert bytes_moved(program_of_one(product, *shapes)) == 64 * 32 * 4
