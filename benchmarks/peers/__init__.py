"""The table methods of this project and of others, each through its own package, at equal bytes in one run.

`python -m benchmarks.peers --help` says how it is started.
"""
