"""Imported once by the fork server of `run_world`."""

import importlib

from distdl.lifeline import die_with_parent

die_with_parent(init_is_fine=True)

for _module in ("torch", "torch._dynamo", "torch.nn.parallel", "distdl.train.process"):
    importlib.import_module(_module)
