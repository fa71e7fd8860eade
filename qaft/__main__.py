"""``python -m qaft`` is ``qaft``."""

from qaft.cli import main

main()
