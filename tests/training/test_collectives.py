import math

import jax

from electrax.training.collectives import Collective, collectives
from electrax.training.sharding import put_batch

PROGRAM = """\
HloModule jit_step, entry_computation_layout={(f32[8])->f32[8]}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %g = f32[4,2]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}, metadata={op_name="in/loop"}
}

%condition (p: (s32[], f32[4,2])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %r = (f32[8]{0}, bf16[2,2]{1,0}, /*index=2*/s32[]) all-reduce(%p), replica_groups={{0,1}}, metadata={op_name="sum"}
  %w = (s32[], f32[4,2]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %s = f32[2]{0} reduce-scatter(%p), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, to_apply=%add
  %half = f32[4]{0} reduce-scatter(%p), replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, dimensions={0}, to_apply=%add
  %alone = f32[8]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add
}
"""


def test_kind_bytes_group_and_repeats_are_read_from_a_program():
    assert collectives(PROGRAM) == [
        Collective("all-reduce", 8 * 4 + 4 * 2 + 4, 2, 1, "sum"),
        Collective("reduce-scatter", 2 * 4 * 4, 4, 1, ""),  # before it is scattered
        Collective("reduce-scatter", 4 * 4 * 2, 2, 1, ""),
        Collective("all-gather", 32, 4, 5, "in/loop"),
    ]


def test_a_sum_is_sent_twice_around_a_ring():
    assert Collective("all-reduce", 800, 8, 1, "").sent == 1400
    assert Collective("all-gather", 800, 8, 3, "").sent == 2100


def compiled(tiny, shape, microbatch):
    """(collectives of a step, bytes of each parameter, bytes of each that is divided along fsdp)."""
    task, mesh = tiny.task(batch_size=16), tiny.mesh(*shape)
    state, step, abstract = tiny.start(task, mesh, microbatch)
    program = step.compiled(state, put_batch(tiny.batch(task, 0), mesh)).as_text()
    sizes = [4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)]
    divided = [
        size for size, leaf in zip(sizes, jax.tree.leaves(abstract.params), strict=True) if "fsdp" in leaf.sharding.spec
    ]
    return collectives(program), sizes, divided


def test_on_a_data_mesh_a_step_exchanges_the_gradients_once_and_nothing_else_of_size(tiny):
    found, sizes, _ = compiled(tiny, (8, 1, 1), microbatch=1)  # two micro-batches
    assert {c.kind for c in found} == {"all-reduce"}
    assert all(c.times == 1 and c.group == 8 for c in found)
    # beside the gradients the loss and the metrics, two numbers each
    assert sum(sizes) < sum(c.size for c in found) < sum(sizes) + 500


def test_on_an_fsdp_mesh_a_step_gathers_the_parameters_and_scatters_the_gradients_once(tiny):
    found, sizes, divided = compiled(tiny, (1, 8, 1), microbatch=1)
    gathered, scattered, summed = (
        [c.size for c in found if c.kind == kind] for kind in ("all-gather", "reduce-scatter", "all-reduce")
    )
    assert sorted(gathered) == sorted(scattered) == sorted(divided)
    rest = sum(sizes) - sum(divided)
    assert rest < sum(summed) < rest + 1000
    assert len(gathered) + len(scattered) + len(summed) == len(found)
    assert all(c.times == 1 for c in found)


def test_on_a_mixed_mesh_each_device_sums_its_own_part_of_the_gradients(tiny):
    found, sizes, divided = compiled(tiny, (2, 4, 1), microbatch=1)
    over_data = sum(c.size for c in found if c.kind == "all-reduce" and c.group == 2)
    assert over_data == sum(divided) / 4
    assert {c.kind for c in found} == {"all-gather", "reduce-scatter", "all-reduce"}


def test_along_model_alone_activations_are_summed_and_nothing_is_gathered(tiny):
    found, _, _ = compiled(tiny, (1, 1, 2), microbatch=16)
    assert {c.kind for c in found} == {"all-reduce"}
    # twice a pass, of the discriminator's one layer; the compiler may join some
    assert sum(c.size for c in found) >= 2 * 2 * (16 * 32 * 32 * 4)
