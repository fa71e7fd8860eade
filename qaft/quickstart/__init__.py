"""The main job in one command: see ``python -m qaft.quickstart --help``."""
