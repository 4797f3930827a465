"""A model as it was read: layers, and the nodes between them for methods that walk backwards.

`build_graph` runs the stages one after the other, and keeps what it finds (`remembered`): a
`graph`, whose equations between layers are put together (`clusters`, `nodes`) once their
derivatives are known to exist (`differentiability`). `unite` reads the terms of a sum of
objectives together.
"""
