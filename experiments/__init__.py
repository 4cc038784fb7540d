"""The runner behind the command `compax`, and the experiments that come with it."""

__all__: list[str] = []
