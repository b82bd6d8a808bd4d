"""A loop of your own: a network learns from a teacher's soft answers beside the labels (distillation).

Run it from the top of the checkout, with one process or several; it is the same run:

    python -m examples.own_loop.train
    torchrun --nproc-per-node 2 -m examples.own_loop.train

Any key may be changed behind it (optim.lr=0.01, hardware.engine=fsdp). Stop it with Ctrl-C, start it again:
it goes on where it stood.
"""

from __future__ import annotations

import sys

import torch
from torch.nn.functional import cross_entropy, kl_div

import distdl
from examples.own_model.model import Mlp


def main() -> None:
    """Train to the end, or go on."""
    torch.manual_seed(1)
    # A stand-in for a network that has been trained: load its weights here.
    teacher = Mlp(num_outputs=10, input_shape=(1, 28, 28)).eval()
    with distdl.open_run("examples/own_loop/recipe.yaml", sys.argv[1:]) as run:
        teacher.to(run.device)
        for step in run.steps():
            for batch in step.microbatches():
                images, labels = batch["images"], batch["labels"]
                said = run.model(images)
                with torch.no_grad():
                    soft = teacher(images).softmax(1)
                hard_loss = cross_entropy(said, labels, reduction="sum")
                soft_loss = kl_div(said.log_softmax(1), soft, reduction="sum")
                step.backward(0.9 * hard_loss + 0.1 * soft_loss, count=len(labels))
            step.apply()
        if run.rank == 0:
            print(f"accuracy after {step.number + 1} steps: {run.metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
