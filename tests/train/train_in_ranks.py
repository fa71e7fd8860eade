"""One of two processes: ``train_in_ranks.py FOLDER CHECKPOINT KIND ...`` trains by every engine, over every base."""

import sys
import warnings
from pathlib import Path

import torch
from engine_ranks import BASES, ENGINES, Case, train

warnings.simplefilter("ignore")
torch.set_num_threads(1)
folder, checkpoint, *kinds = sys.argv[1:]
for kind in kinds:
    for base in BASES:
        for engine in ENGINES:
            train(Case(kind, base, engine), Path(checkpoint), Path(folder))
