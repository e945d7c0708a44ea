"""One thread for everything: on a busy machine a second one costs more than it brings."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
