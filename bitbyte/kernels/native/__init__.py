"""A native engine for inference on a CPU: one call of machine code per step.

`vector` is the language the kernels are written in, `machine` compiles and runs them; `products`,
`ngrams`, `transformer` and `mamba` hold the kernels, the last two also what a block of their family
does; `engine` makes a whole model of it.  Everything here needs llvmlite;
`kernels.engine.engine_for` is the door that does not.
"""
