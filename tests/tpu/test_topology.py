"""Meshes over slices, as text."""

import pytest

from compax.errors import ShardingError, TargetError
from compax.passes.shard.rules import check_axis
from compax.placement import mesh_text
from compax.target import Target
from compax.tpu import make_mesh, parse_mesh

V5E = Target.parse("v5e:4x4")


@pytest.mark.parametrize(
    ("text", "axes"),
    [
        ("data=16", {"data": 16}),
        ("data=4,model=4", {"data": 4, "model": 4}),
        (" data = -1 , model=2 ", {"data": 8, "model": 2}),
        ("data=16,model=-1", {"data": 16, "model": 1}),
    ],
)
def test_meshes_as_text(text, axes):
    assert parse_mesh(text, V5E) == axes
    assert parse_mesh(mesh_text(axes), V5E) == axes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=8", "is of 8 devices, v5e:4x4 has 16"),
        ("data=3,model=-1", "is of 3 times what is left of devices, v5e:4x4 has 16"),
        ("data=-1,model=-1", "only one axis can be -1, data and model are"),
        ("data", "is not AXIS=SIZE"),
        ("data=x", "is not AXIS=SIZE"),
        ("", "is not AXIS=SIZE"),
        ("data=4,data=4", "the axis 'data' is there twice"),
        ("data=0", "has the size 0"),
        ("data=-2", "has the size -2"),
    ],
)
def test_what_is_wrong_with_a_mesh(text, message):
    with pytest.raises(ShardingError) as told:
        parse_mesh(text, V5E)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_an_unknown_slice_names_the_closest():
    with pytest.raises(TargetError, match="v5e"):
        Target.parse("v5x:4x4")


def test_a_cpu_takes_any_mesh():
    target = Target.parse("cpu")
    axes = parse_mesh("data=4,model=2", target)
    mesh = make_mesh(target, axes)
    assert dict(mesh.shape) == {"data": 4, "model": 2}
    assert len(set(mesh.devices.flat)) == 8


def test_an_unknown_axis_names_the_closest():
    with pytest.raises(
        ShardingError, match="names the mesh axis 'modle', the mesh has data, model; did you mean model"
    ):
        check_axis("modle", {"data": 2, "model": 2}, "sharding.batch")
