"""Slices and pods: what a program needs beyond one machine.

`compile_for` compiles for a slice of TPUs with none attached; `initialize` joins the processes of several hosts.
"""

from compax.tpu.compiling import Compiled, Memory, Request, Shortage, compile_for
from compax.tpu.distributed import Processes, initialize
from compax.tpu.topology import make_mesh, parse_mesh
from compax.tpu.worker import Built

__all__ = [
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
]
