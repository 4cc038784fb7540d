"""The pass contract: options, registration, reports, records."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import pytest

from compax import transform
from compax.errors import PipelineError, SelectorError
from compax.transform import Context, Footprint, Pass, PassRecord, PassResult, SiteReport, register, registered


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(Pass):
    """Not registered."""

    phase: ClassVar[str] = "precision"
    size: int = 1
    words: tuple[str, ...] = ()


@pytest.fixture
def no_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that a test registers are forgotten after it."""
    monkeypatch.setattr(transform, "_REGISTRY", dict(transform._REGISTRY))


def test_options_are_checked_when_a_pass_is_made() -> None:
    with pytest.raises(PipelineError, match="Plain: the option 'size' takes an integer, not '3'"):
        Plain(size="3")  # type: ignore[arg-type]
    with pytest.raises(PipelineError, match="the option 'strict' takes true or false, not 1"):
        Plain(strict=1)  # type: ignore[arg-type]
    with pytest.raises(SelectorError, match="malformed selector"):
        Plain(at="a..b")


def test_lists_become_tuples_so_that_passes_are_equal_and_hashable() -> None:
    one: Any = Plain(words=["a"])  # type: ignore[arg-type]
    assert one == Plain(words=("a",))
    assert hash(one) == hash(Plain(words=("a",)))
    assert one != Plain(words=("b",))


def test_text_leaves_defaults_out_and_ends_with_strictness() -> None:
    assert str(Plain()) == "Plain()"
    assert str(Plain(strict=False, size=2, at="a.*")) == "Plain(at=a.*, size=2, strict=false)"
    assert str(Plain(at="a,!b")) == 'Plain(at="a,!b")'


def test_a_pass_is_frozen_and_its_options_have_names() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plain().size = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        Plain("**")  # type: ignore[call-arg]


def test_select() -> None:
    sites = [SiteReport("a", "linear", "matched"), SiteReport("b", "linear", "matched")]
    assert Plain(at="a").select(sites) == sites[:1]
    assert Plain(at="c", strict=False).select(sites) == []
    with pytest.raises(SelectorError, match="'c' matches no linear"):
        Plain(at="c").select(sites, what="linear")


def test_registered_passes_are_those_of_the_package_too() -> None:
    assert {"quantize", "freeze"} <= set(registered())
    assert all(name == pass_type.name for name, pass_type in registered().items())
    assert list(registered()) == sorted(registered())


@pytest.mark.usefixtures("no_registration")
def test_registration() -> None:
    @register("plainest")
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Plainest(Pass):
        """Does nothing."""

        phase: ClassVar[str] = "memory"

    assert registered()["plainest"] is Plainest
    assert str(Plainest()) == "plainest()"
    register("plainest")(Plainest)  # as a reloaded module does

    class Other(Plainest):
        """Has its name."""

    with pytest.raises(TypeError, match=r"the name belongs to .*Plainest"):
        register("plainest")(dataclasses.dataclass(frozen=True, kw_only=True)(Other))


@pytest.mark.parametrize(
    ("options", "fields", "says"),
    [
        ({"frozen": True}, {"x": (int, 1)}, "put it above @dataclasses.dataclass"),
        ({"frozen": True, "kw_only": True}, {"x": (dict[str, int], 1)}, "the option 'x' has no text form"),
        ({"frozen": True, "kw_only": True, "phase": "later"}, {}, "'phase' is one of structure, precision"),
        ({"frozen": True, "kw_only": True, "name": "a pass"}, {}, "letters, digits and underscores"),
    ],
)
@pytest.mark.usefixtures("no_registration")
def test_registration_refuses(options: dict[str, Any], fields: dict[str, Any], says: str) -> None:
    name, phase = options.pop("name", "refused"), options.pop("phase", "memory")
    body = {key: default for key, (_, default) in fields.items()}
    annotations = {key: annotation for key, (annotation, _) in fields.items()}
    made = type("Refused", (Pass,), {"phase": phase, "__annotations__": annotations, **body})
    with pytest.raises(TypeError, match=says):
        register(name)(dataclasses.dataclass(**options)(made))


@pytest.mark.usefixtures("no_registration")
def test_registration_refuses_what_is_no_dataclass() -> None:
    with pytest.raises(TypeError, match="put it above"):
        register("refused")(type("Refused", (Plain,), {}))


def test_a_result_changed_something_if_a_site_was_rewritten() -> None:
    program: Any = object()
    matched, rewritten = SiteReport("a", "linear", "matched"), SiteReport("b", "linear", "rewritten")
    assert not PassResult(program, (matched,)).changed
    assert PassResult(program, (matched, rewritten)).changed


def test_a_record_in_one_line() -> None:
    sites = (
        SiteReport("a", "linear", "rewritten"),
        SiteReport("b", "linear", "skipped", "already int8"),
        SiteReport("c", "linear", "skipped", "shared with d"),
        SiteReport("e", "linear", "skipped", "already int8"),
    )
    record = PassRecord(
        pass_=Plain(size=3),
        sites=sites,
        decisions={},
        notes=("a note",),
        before=Footprint(1200, 4800),
        after=Footprint(1200, 1_300_000),
        seconds=0.125,
        metrics={"loss": (1.25, 1.5), "relative output error": 0.006},
    )
    assert record.text == "Plain(size=3)"
    assert record.count("skipped") == 3
    assert str(record) == (
        "Plain(size=3): 1 rewritten, 3 skipped (already int8; shared with d), 1,200 parameters, 4.8 kB -> 1.3 MB, "
        "loss 1.25 -> 1.5, relative output error 0.006, 0.12 s, a note"
    )


def test_footprint_counts_shapes_too() -> None:
    import sample_passes

    program = sample_passes.make_program()
    size = sample_passes.LAYERS * (sample_passes.D**2 + sample_passes.D)
    assert Footprint.of(program) == Footprint(size, 4 * size)
    shapes = {path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for path, x in program.params.items()}
    assert Footprint.of(program.replace(params=shapes)) == Footprint(size, 2 * size)


def test_a_context_releases_only_what_was_given_away() -> None:
    old, shared = jnp.ones(3), jnp.zeros(2)
    Context().release((old, shared), shared)
    assert not old.is_deleted()
    Context(donate=True).release((old, shared, jax.ShapeDtypeStruct((1,), jnp.float32)), (shared, old + 1))
    assert old.is_deleted()
    assert not shared.is_deleted()


def test_graphs_that_no_pass_changes_stay_the_same_mapping() -> None:
    import sample_passes

    program = sample_passes.make_program()
    assert Plain().rewrite_graphs(program, {}) is program.graphs
    changed = sample_passes.BreakShape().rewrite_graphs(program, {})
    assert changed is not program.graphs
    assert changed.keys() == program.graphs.keys()
