"""A SIMT machine in NumPy that runs the PTX which Triton compiles: what the compiler made, without a GPU.

    program     text -> basic blocks        forms, translate   block -> a Python function over arrays, a lane a thread
    arithmetic  bit-exact pieces            memory, onchip     global; shared and local; with checks
    machine     what a function sees        kernel             a launch: who runs next, counters
    host        Triton's launches, taken over                  cases, counts      what is run, what it costs

It says what the code computes, and faults where a GPU would or where the result would depend on timing. It does not
say how long it takes, and `ptxas` may still fuse a product with a sum: bits are not the GPU's. `mma`, `wgmma`,
`cp.async`, atomics and double precision are not known: no kernel uses them, and an unknown form raises.
"""
