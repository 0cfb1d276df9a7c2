"""Reading a kernel's machine code: its speed by a model, without a GPU.

`cubin` finds device code inside extensions and objects, `disassembler` reads it, `control_flow`
finds main loops, `pipes` says which unit an instruction occupies, `model` turns counts into clocks,
`report` puts it together, compares builds and checks a budget.
"""
