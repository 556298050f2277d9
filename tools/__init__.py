"""Programs for who works on fastnn, run from the checkout and not installed with the package.

python -m tools.generate   writes what the documents derive from the code
python -m tools.stubs      writes typings/, by which type checkers find torch.nn's submodules
python -m tools.aot        compiles what all rows launch, for GPUs that are not here
python -m tools.ptx        runs all rows on that compiled code, on the CPU
"""
