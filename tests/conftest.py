"""Settings of the whole suite."""

import torch

torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
