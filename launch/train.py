"""What launchers start: ``python launch/train.py RECIPE [key=value ...]`` is ``qaft train RECIPE [key=value ...]``."""

import sys

from qaft.cli import main

main(["train", *sys.argv[1:]])
