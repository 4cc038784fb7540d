"""Composites with a meaning: attention, normalization, feed-forward, experts, found by dataflow over the normal form.

Finding rewrites nothing. No recognition rests on the class of a layer, on names or on the order of operands: each is
anchored on what the mathematics cannot do without (a softmax, a reciprocal root, a pair of products around an
activation), and what can be told by evaluating a region is told by that.
"""
