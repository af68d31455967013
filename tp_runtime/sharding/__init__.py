"""What becomes of a model's tensors under tensor parallelism, as data.

``table``: a model's tensors, row by row. ``plan``: the styles of its linears. ``parts``: which
slice a rank reads. ``block_costs``: what one evaluation consists of.
"""
