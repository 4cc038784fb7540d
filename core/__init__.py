"""compax: compiler passes for JAX.

A Flax model is captured as a `Program`, transformed by passes in a `Pipeline`, and runs as an ordinary JAX function.
"""

if __name__ != "compax":
    raise ImportError(
        "this folder is the package 'compax': install the checkout (pip install -e .) and write 'import compax'"
    )

from compax.encoding import Encoded
from compax.errors import CompaxError
from compax.pipeline import Pipeline
from compax.program import Program, capture
from compax.storage import load, save
from compax.verify import verify

__all__ = ["CompaxError", "Encoded", "Pipeline", "Program", "capture", "load", "save", "verify"]
