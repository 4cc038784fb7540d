"""The names that users build on. A change here is a change of the public API: it belongs in CHANGELOG.md."""

import dataclasses
import importlib
import inspect
import types
from collections.abc import Iterator
from typing import Any

import pytest

PUBLIC: dict[str, list[str]] = {
    "compax": ["CompaxError", "Encoded", "Pipeline", "Program", "capture", "load", "save", "verify"],
    "compax.experiments": [],
    "compax.models": [
        "Decoder",
        "DecoderConfig",
        "KVCache",
        "Llama2cTokenizer",
        "SIZES",
        "Weights",
        "build_decoder",
        "example_inputs",
        "load_decoder",
        "load_tokenizer",
        "loss",
        "open_llama2c_tokenizer",
        "open_weights",
        "save_safetensors",
        "smollm2_path",
    ],
    "compax.passes": ["Cast", "Flash", "Freeze", "Offload", "Quantize", "Remat", "Shard", "TileLoss"],
    "compax.tpu": [
        "Built",
        "Compiled",
        "Memory",
        "Processes",
        "Request",
        "Shortage",
        "compile_for",
        "initialize",
        "make_mesh",
        "parse_mesh",
    ],
}


def documented(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """What has to have a docstring: a public name, and the public methods and properties that its class defines."""
    if isinstance(thing, types.ModuleType) or callable(thing):
        yield name, thing
    if inspect.isclass(thing):
        for attribute, value in vars(thing).items():
            if not attribute.startswith("_") and isinstance(value, types.FunctionType | property | classmethod):
                yield f"{name}.{attribute}", getattr(thing, attribute)


def has_docstring(thing: Any) -> bool:
    text = inspect.getdoc(thing) or ""
    if inspect.isclass(thing):  # neither inherited, nor the signature that dataclasses put there
        text = thing.__dict__.get("__doc__") or ""
        return bool(text) and not text.startswith(f"{thing.__name__}(")
    return bool(text)


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_these(package: str) -> None:
    assert sorted(importlib.import_module(package).__all__) == sorted(PUBLIC[package])


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_exist_and_are_documented(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__doc__
    items = [item for name in module.__all__ for item in documented(f"{package}.{name}", getattr(module, name))]
    assert [name for name, thing in items if not has_docstring(thing)] == []


def test_a_missing_docstring_is_noticed() -> None:
    @dataclasses.dataclass
    class Undocumented:
        size: int

        def double(self) -> int:
            return 2 * self.size

    missing = [name for name, thing in documented("Undocumented", Undocumented) if not has_docstring(thing)]
    assert missing == ["Undocumented", "Undocumented.double"]
