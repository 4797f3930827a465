"""The jaxpr of a model on one example, flat, and what each of its values depends on.

`flat_model.flatten_model` is the way in: calls are inlined (`inline`), loops unrolled or kept with
flat bodies (`loops`, `iterations`, `numbered`), complex kernels taken as two (`complex_parts`),
derivative rules kept (`custom_vjp`), products put in another order (`reassociate`), branches freed
of their guards (`guards`), and each value annotated once (`roles`). What is beside the outputs is
`auxiliary`; statistics of the batch come by a `named_axis`.
"""
