"""What a train step takes where `shard` lays a program as it was told, predicted without compiling."""

import dataclasses

from compax.analysis.training import Optimizer
from compax.meaning import Meaning
from compax.passes.shard import choosing
from compax.passes.shard.candidates import Candidate
from compax.passes.shard.predicting import Predicted
from compax.passes.shard.shard import Shard
from compax.program import Program
from compax.target import Target
from compax.transform import Context, Pass


def predicted_step(
    shard: Shard, program: Program, target: Target, following: tuple[Pass, ...], optimizer: Optimizer | int = 2
) -> Predicted:
    """What a train step takes on each device.

    Args:
        shard: the pass, its sizes given.
        program: what it is applied to; parameters may be shapes.
        target: the slice.
        following: the passes that come after it.
        optimizer: of the step, or how many float32 arrays it keeps for each parameter.

    Raises:
        CompaxError: the program cannot be laid so, or has no loss.
    """
    if shard.model is not None:
        shard = dataclasses.replace(shard, model=None, tensor=shard.model, sequence=shard.sequence and "tensor")
    given = shard.sizes(None if target.chip.platform == "cpu" else target.num_devices)
    sizes = {name: size for name, size in given.items() if size > 1}
    candidate = Candidate(tuple(sizes.items()), shard.zero, shard.sequence is not None)
    asked = Shard(at=shard.at, strict=shard.strict, rules=shard.rules, pad=shard.pad, auto=True)
    meanings = {key: Meaning(captured, program.declared) for key, captured in program.graphs.items()}
    problem = asked.problem(program, meanings, Context(target=target, following=following))
    model, _ = choosing.model_of(problem, optimizer)
    return model.predict(candidate, problem.lay(candidate))
