"""Rewrites of whole graphs that several passes need: indices of axes kept, parameters split, operations outlined."""
