"""One module per verb of the command line: what it does, without how its arguments are parsed."""
