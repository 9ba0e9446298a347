"""The table methods of this project and of others, each through its own package, at equal bytes in one run.

`python -m benchmarks.peers --help` says how it is started.
"""

import logging


for _name in ("torchao", "torch.utils._pytree"):  # what of torchao does not load here is said in each process again
    logging.getLogger(_name).setLevel(logging.ERROR)
