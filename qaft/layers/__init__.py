"""Where base, update, rotation and quantizer meet: the module that replaces a linear layer."""
