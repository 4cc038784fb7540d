"""Offloading: what it puts into a program's placement, and what it leaves alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from compax.errors import PipelineError, SelectorError
from compax.passes import Offload
from compax.pipeline import Pipeline
from compax.placement import DEVICE, HOST, Placement
from compax.transform import Context
from small import program_of, run, statuses


def test_the_placement_says_it() -> None:
    program = run("offload()", program_of())
    assert program.placement == Placement(optimizer_memory=HOST)
    assert statuses(program) == {"optimizer": "rewritten"}
    both = run("offload(parameters=true, at=embed.**)", program_of())
    assert both.placement.memory == {"embed.embedding": HOST}
    assert statuses(both) == {"optimizer": "rewritten", "embed.embedding": "rewritten"}
    alone = run("offload(optimizer=false, parameters=true)", program_of())
    assert alone.placement.optimizer_memory == DEVICE
    assert alone.placement.memory.keys() == alone.params.keys()


def test_graphs_parameters_and_the_rest_of_the_placement_stay() -> None:
    before = program_of().replace(placement=Placement(memory={"norm.bias": HOST}))
    after = run("offload()", before)
    assert after.graphs is before.graphs
    assert all(after.params[path] is x for path, x in before.params.items())
    assert after.placement.memory == {"norm.bias": HOST}


def test_again_changes_nothing() -> None:
    once = run("offload(parameters=true)", program_of())
    result = Offload(parameters=True).run(once, Context())
    assert result.program is once
    assert {site.status for site in result.sites} == {"matched"}


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(PipelineError, match="moves nothing"):
        Offload(optimizer=False)
    with pytest.raises(PipelineError, match="give parameters=true"):
        Offload(at="embed.**")
    with pytest.raises(SelectorError):
        run("offload(parameters=true, at=nothing)", program_of())


def test_text() -> None:
    for text in ("offload()", "offload(at=embed.**, parameters=true)", "offload(optimizer=false, parameters=true)"):
        assert Pipeline.parse(str(Pipeline.parse(text))) == Pipeline.parse(text)


def test_a_call_takes_parameters_from_the_host() -> None:
    plain, tokens = program_of(), jnp.zeros((2, 4), jnp.int32)
    program = run("offload(parameters=true)", plain)
    there = program.replace(params=program.placement.placed(program.params))
    assert {x.sharding.memory_kind for x in there.params.values()} == {HOST}
    np.testing.assert_array_equal(there(tokens), plain(tokens))
