"""Imported by the fork server, once: what every worker needs, so that a new attempt starts in no time.

Importing torch and its parts takes seconds; a worker forked from here has them at once.
"""

import importlib

from distdl.lifeline import die_with_parent

die_with_parent(init_is_fine=True)

for _module in (
    "torch",
    "torch._dynamo",  # optimisers import it at their first step otherwise
    "torch.distributed.elastic.multiprocessing.api",
    "torch.nn.parallel",
    "distdl.launch.worker",
    "distdl.train.process",
):
    importlib.import_module(_module)
