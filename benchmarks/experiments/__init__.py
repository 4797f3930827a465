"""A module or package for every command, `python -m benchmarks NAME`: its `main(arguments)`."""
