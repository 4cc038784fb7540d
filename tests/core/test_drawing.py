"""Pictures of programs: well formed, complete, and no text beyond its box."""

import dataclasses
import pathlib
import re
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import compax
from compax.drawing import _ADVANCE, _BOX, shortened
from compax.experiments.benchmarks import zoo
from compax.experiments.cli import main
from compax.models import decoder

foreign_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(x.itertext()) for x in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def tiny(**options: Any) -> compax.Program:
    config = dataclasses.replace(decoder.SIZES["tiny"], **options)
    model = decoder.Decoder(config, rngs=nnx.Rngs(0))
    return compax.capture(model, *decoder.example_inputs(config, sequence=9), mode="eval", name="tiny")


@foreign_warnings
@pytest.mark.parametrize("name", ["tunix_qwen3_experts", "flax_clip", "flax_whisper", "flax_resnet", "flax_gpt2"])
def test_third_party_models(name: str) -> None:
    program = zoo.build(name).capture()
    svg = program.draw().svg
    shown = " ".join(x.text or "" for x in ElementTree.fromstring(svg).iter(f"{SVG}title"))
    collapsed = {re.sub(r"\.\d+\b", ".*", composite.name) for composite in program.composites()}
    drawn = re.sub(r"\.\d+\b", ".*", shown)
    assert all(composite in drawn for composite in collapsed)


def test_equal_layers_are_drawn_once() -> None:
    written = texts(tiny(num_layers=5).draw().svg)
    assert "blocks.{0..4} × 5" in written
    assert sum("attention" in text for text in written) == 2  # the box, and the legend
    assert any("(scan)" in text for text in texts(tiny(scan=True).draw().svg))


def test_the_same_program_gives_the_same_picture() -> None:
    program = tiny()
    assert program.draw().svg == program.draw().svg


def test_text_stays_inside_of_its_box() -> None:
    for element in ElementTree.fromstring(tiny().draw().svg).iter(f"{SVG}g"):
        for text in element.iter(f"{SVG}text"):
            assert len(text.text or "") * float(text.attrib["font-size"]) * _ADVANCE <= _BOX
    assert shortened("a" * 100, 10, 61.0) == "a" * 9 + "…"


def test_odd_names_are_escaped() -> None:
    params = {"<a&b>": jnp.ones((3, 4))}
    program = compax.capture(lambda params, x: x @ params["<a&b>"], params, jnp.ones((2, 3)), name="tiny")
    drawing = program.draw()
    assert any("<a&b>" in text for text in texts(drawing.svg))
    assert "<a&b>" not in drawing.html


def test_the_page_needs_nothing_else() -> None:
    page = tiny().draw().html
    assert not re.search(r"(src|href)=", page)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_drawing_is_saved_by_its_ending(tmp_path: pathlib.Path) -> None:
    drawing = tiny().draw()
    drawing.save(str(tmp_path / "a.svg"))
    assert (tmp_path / "a.svg").read_text() == drawing.svg
    with pytest.raises(ValueError, match=r"\.svg"):
        drawing.save(str(tmp_path / "a.png"))


def test_the_command_line_draws_and_lists(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny.html"
    assert main(["inspect", "--model=tiny", "--abstract", "--composites", "--axes", f"--draw={file}"]) == 0
    printed = capsys.readouterr().out
    assert "blocks.{0,1}.attn" in printed
    assert "mask causal" in printed
    assert "blocks.{0,1}.mlp.hidden" in printed
    assert file.exists()
    assert main(["inspect", "--model=tiny", "--abstract", "--draw=tiny.png"]) == 2
    assert "ends in .svg or .html" in capsys.readouterr().err


def test_a_program_without_a_stream() -> None:
    def model(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    program = compax.capture(model, {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}, jnp.ones((2, 3)))
    assert any("feed forward" in text for text in texts(program.draw().svg))
