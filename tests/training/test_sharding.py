import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from electrax.config import UserError
from electrax.models.sizes import SIZES, GeneratorConfig, ModelConfig, discriminator_shape, generator_shape
from electrax.tasks.answer import AnswerTask
from electrax.tasks.classify import ClassifyTask
from electrax.tasks.pretrain import ObjectiveConfig, PretrainTask, SpecialIds
from electrax.tasks.rewrite import RewriteTask
from electrax.training.optim import OptimizerConfig, make_optimizer
from electrax.training.sharding import (
    TABLE,
    MeshConfig,
    local_rows,
    make_mesh,
    params_sharding,
    put_batch,
    row_ways,
    spec_of,
)
from electrax.training.state import abstract_state


def make_task(
    size="small", body="electra", kind="rtd", embeddings="shared", generator_kind="masked", own_body="", **numbers
):
    """Two layers: every further one is named alike."""
    model = ModelConfig(size=size, body=body, qk_norm=body == "modern", **{"layers": 2, **numbers})
    discriminator = discriminator_shape(model, 30522)
    generator = discriminator
    if kind == "rtd":
        options = GeneratorConfig(kind=generator_kind, embeddings=embeddings, body=own_body)
        generator = generator_shape(model, options, discriminator)
    special, objective = SpecialIds(0, 101, 102, 103), ObjectiveConfig(kind=kind)
    shared = embeddings == "shared"
    return PretrainTask(
        objective, discriminator, generator, special, "packed", shared, generator_kind=generator_kind, batch_size=8
    )


def shapes_by_path(task):
    """Shapes alone: nothing is computed."""
    batch = {"ids": np.zeros((1, 8), np.int32)}
    tree = jax.eval_shape(lambda: task.init(jax.random.key(0), batch))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}


KINDS = [  # objective, embeddings, generator, its body
    ("rtd", "shared", "masked"),
    ("rtd", "separate", "masked"),
    ("rtd", "separate", "two_tower"),
    ("rtd", "shared", "shared"),
    ("mlm", "shared", "masked"),
    ("rtd", "separate", "causal", "gpt2"),
]


@pytest.mark.parametrize("body", ["electra", "modern"])
@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_of_every_model_fits_one_row_of_the_table(size, body):
    for kinds in KINDS:
        for path, shape in shapes_by_path(make_task(size, body, *kinds)).items():
            rows = [spec for pattern, spec in TABLE if re.fullmatch(pattern, path)]
            assert len(rows) == 1, f"{path} fits {len(rows)} rows"
            assert spec_of(path) == rows[0]
            assert len(rows[0]) <= len(shape), f"{path} {shape} has fewer axes than {rows[0]}"


def test_every_row_of_the_table_is_some_parameter():
    paths = {path for body in ("electra", "modern") for path in shapes_by_path(make_task(body=body))}
    paths |= set(shapes_by_path(make_task("base", embeddings="separate")))
    encoder = make_task().discriminator
    paths |= set(shapes_by_path(ClassifyTask(encoder, 0, 102, classes=("0", "1"), style="dense")))
    paths |= set(shapes_by_path(AnswerTask(encoder, 0, 102)))
    paths |= set(shapes_by_path(RewriteTask(encoder, 0, 102, decoder=encoder, own_vocabulary=True)))
    assert [pattern for pattern, _ in TABLE if not any(re.fullmatch(pattern, path) for path in paths)] == []


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("embeddings/word", P("fsdp", None)),
        ("generator_embeddings/word", P("fsdp", None)),
        ("discriminator/encoder/layer_11/attention/qkv/kernel", P("fsdp", "model", None, None)),
        ("discriminator/encoder/layer_0/attention/output/kernel", P("model", None, "fsdp")),
        ("generator/encoder/layer_0/up/kernel", P("fsdp", "model")),
        ("generator/encoder/layer_0/down/kernel", P("model", "fsdp")),
        ("generator/encoder/layer_0/down/bias", P()),
        ("generator/backward_encoder/layer_0/down/kernel", P("model", "fsdp")),
        ("discriminator/encoder/layer_3/output_norm/scale", P()),
    ],
)
def test_a_parameter_lies_where_the_table_says(path, spec):
    assert spec_of(path) == spec


@pytest.mark.parametrize("path", ["embeddings/words", "classifier/kernel", "encoder/layer_0/up/kernel"])
def test_a_parameter_that_fits_no_row_is_an_error_that_names_it(path):
    with pytest.raises(UserError, match=f"parameter {path} fits 0 rows of the sharding table; exactly one is needed"):
        spec_of(path)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_the_paper_sizes_divide_over_eight_devices(size):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    task = make_task(size)
    tree = jax.eval_shape(lambda: task.init(jax.random.key(0), {"ids": np.zeros((1, 8), np.int32)}))
    shardings = params_sharding(tree, mesh)
    rows = tree["embeddings"]["word"].shape[0]
    assert shardings["embeddings"]["word"].shard_shape(tree["embeddings"]["word"].shape)[0] == rows // 8


def test_an_axis_that_does_not_divide_is_an_error_that_names_the_parameter():
    task = make_task(width=36, heads=3, embedding_width=32)
    tree = jax.eval_shape(lambda: task.init(jax.random.key(0), {"ids": np.zeros((1, 8), np.int32)}))
    with pytest.raises(UserError) as caught:
        params_sharding({"discriminator": tree["discriminator"]}, make_mesh(MeshConfig(model=2)))
    path = "discriminator/encoder/layer_0/attention/output/kernel"
    assert str(caught.value) == f"parameter {path} (3, 12, 36): 3 is not divisible by mesh.model 2"


def test_the_moments_lie_where_their_parameters_lie():
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    task = make_task("tiny")
    state = abstract_state(task, make_optimizer(OptimizerConfig(), 10), {"ids": np.zeros((8, 8), np.int32)}, mesh)
    parameters = {path: leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        of = [s for p, s in parameters.items() if path[-len(p) :] == p]
        assert leaf.sharding == (of[0] if of else jax.NamedSharding(mesh, P())), path
        found += bool(of)
    assert found == 2 * len(parameters)  # mean and square


# -- meshes -----------------------------------------------------------------------------------------------------------


def test_data_takes_the_devices_that_the_other_axes_leave():
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "model": 1}
    assert dict(make_mesh(MeshConfig(fsdp=2, model=2)).shape) == {"data": 2, "fsdp": 2, "model": 2}
    assert row_ways(make_mesh(MeshConfig(fsdp=2, model=2))) == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(fsdp=3), "mesh.fsdp 3 x mesh.model 1 does not divide 8 devices"),
        (MeshConfig(fsdp=4, model=4), "mesh.fsdp 4 x mesh.model 4 does not divide 8 devices"),
        (MeshConfig(fsdp=0), "mesh.fsdp 0 x mesh.model 1 does not divide 8 devices"),
        (MeshConfig(fsdp=-2, model=-1), "mesh.fsdp -2 x mesh.model -1 does not divide 8 devices"),
        (MeshConfig(data=-4, fsdp=2), "mesh.data -4 x fsdp 2 x model 1 is not the number of devices, 8"),
        (MeshConfig(data=3, fsdp=2), "mesh.data 3 x fsdp 2 x model 1 is not the number of devices, 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(config, message):
    with pytest.raises(UserError) as caught:
        make_mesh(config)
    assert str(caught.value) == message


def test_the_rows_of_a_batch_go_to_the_devices_in_order():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    placed = put_batch({"ids": np.arange(8).reshape(8, 1)}, mesh)["ids"]
    assert np.asarray(placed).ravel().tolist() == list(range(8))
    first = [shard.data for shard in placed.addressable_shards if shard.device == mesh.devices[1, 0, 0]]
    assert np.asarray(first[0]).ravel().tolist() == [4, 5]
    assert local_rows(8, mesh) == slice(0, 8)  # one process reads them all
