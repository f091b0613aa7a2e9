"""A SIMT machine in NumPy that runs the PTX compiled by Triton, without a GPU.

    program     text -> basic blocks        forms, translate   block -> a Python function over arrays, a lane a thread
    arithmetic  bit-exact pieces            memory, onchip     global; shared and local; with checks
    machine     the state of a function     kernel             a launch: scheduling, counters
    host        replaces Triton's launches  cases, counts      runs and their costs

It computes the results of the code. It raises where a GPU would fault, and where the result would depend on timing. It
measures no time, and `ptxas` may still fuse a product with a sum, so bits can differ from a GPU's. `mma`, `wgmma`,
atomics and double precision are not implemented: no kernel uses them, and an unknown form raises.
"""
