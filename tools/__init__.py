"""Programs for developers of fastnn. They run from the checkout and are not installed.

python -m tools.generate   writes the parts of the documents that are derived from the code
python -m tools.stubs      writes typings/, in which type checkers find the submodules of torch.nn
python -m tools.aot        compiles the launches of all rows, for GPUs that are not present
python -m tools.ptx        runs all rows on that compiled code, on the CPU
"""
