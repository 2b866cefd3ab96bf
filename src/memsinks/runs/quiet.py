"""Importing this keeps out of a command's output what torchao and torch log about each other when transformers imports them.

Neither is about a model or a text: torchao names those of its libraries that are for other machines.
"""

import logging

for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
