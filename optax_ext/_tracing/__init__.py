"""What a traced computation tells of a network, for `optax_ext.architecture`.

`run.py` goes through the computation and notes where each parameter meets the data; `preparing.py`
has the rules for what is made of parameters alone, `parts.py` where each of them stands in it, and
`numbers.py` follows the indices and counters that the computation knows before it runs.
"""
