"""A native engine for inference on a CPU: one call of machine code per step.

`vector` is the language the kernels are written in, `machine` compiles and runs them, `products`,
`transformer` and `ngrams` hold the kernels, and `engine` lists a model's operations.  Everything
here needs llvmlite; `kernels.engine.engine_for` is the door that does not.
"""
