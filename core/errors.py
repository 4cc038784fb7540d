"""Every error that compax raises on purpose.

A message says what is wrong, where, why, and what to do about it. All are `CompaxError`, so that a command line can
print one readable line and exit; those that come from a user's value are `ValueError` too.
"""


class CompaxError(Exception):
    """Base of all errors that compax raises on purpose."""


class CaptureError(CompaxError, ValueError):
    """A model or its example inputs cannot be captured."""


class SignatureError(CompaxError, ValueError):
    """A captured program was called with inputs that no graph of it accepts."""


class SelectorError(CompaxError, ValueError):
    """A selector is malformed or matched nothing; the message names the closest sites."""


class EncodingError(CompaxError, ValueError):
    """An encoding cannot represent a parameter, or an operation cannot be applied to it."""


class LoweringError(CompaxError):
    """A graph cannot be turned into a JAX function as it was asked to."""


class InferenceError(CompaxError):
    """A changed dtype or shape cannot be carried through an operation."""


class DeclarationError(CompaxError, ValueError):
    """What is declared of a program fits nothing in it."""


class RewriteError(CompaxError):
    """A rewrite of a graph cannot be done as it was asked for."""


class PlacementError(CompaxError, ValueError):
    """An array cannot live where it was asked to: no such memory, mesh or spec."""


class VerificationError(CompaxError):
    """A program is malformed: a shape, a dtype or a reference does not hold."""


class ContractError(CompaxError):
    """A pass changed outputs by more than its contract allows."""


class PassError(CompaxError):
    """A pass failed; the message names the pass and the reproducer file."""


class PipelineError(CompaxError, ValueError):
    """A pipeline is malformed: bad text, an unknown pass or option, a conflict or a wrong order."""


class CheckpointError(CompaxError, ValueError):
    """A checkpoint is missing, damaged, or belongs to something else."""


class WeightsError(CompaxError, ValueError):
    """A weight file is damaged or does not fit the model."""


class ConfigError(CompaxError, ValueError):
    """An experiment config has an unknown field, a wrong type or an impossible value."""


class DataError(CompaxError, ValueError):
    """Training data cannot be found or read."""


class TargetError(CompaxError, ValueError):
    """A target names a chip, a slice or a unit that does not exist, or what is asked of it has no figure."""


class MetricError(CompaxError, ValueError):
    """Figures from which a metric cannot be computed."""


class ShardingError(CompaxError, ValueError):
    """A mesh or a sharding does not fit the devices, the parameters or the batch."""


class CompileError(CompaxError):
    """A program cannot be compiled for a slice: no compiler, a failing one, or one that was killed."""


class NoCompilerError(CompileError):
    """Nothing here compiles for a target; says what to install."""


class MemoryLimitError(CompileError):
    """A program needs more memory than a chip of its target has."""


class LaunchError(CompaxError, ValueError):
    """What should be launched is malformed, or cannot be launched from here."""


class DistributedError(CompaxError):
    """Processes do not find each other, do not fit together, or one of them is gone."""


class BudgetError(CompaxError):
    """A memory budget cannot be met; says what the least is, and what holds it up."""
