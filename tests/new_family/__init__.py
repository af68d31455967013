"""A family of models that the pack does not have, to show what adding one takes.

`family.py` and `forward.py` are what an author writes (`docs/adding_a_model.md` tells the story);
`plain.py` is the model itself, in plain torch, which they must equal.
"""
