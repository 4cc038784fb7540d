"""Slices and pods: what a program needs beyond one machine. Empty so far; README.md says what belongs here."""

__all__: list[str] = []
