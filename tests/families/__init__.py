"""What is special about a family in tests, one file or a few each; the suites find what they need by name.

`<family>_kernels.py` declares what `tests.compile_check` compiles: its `KERNELS`.
"""
