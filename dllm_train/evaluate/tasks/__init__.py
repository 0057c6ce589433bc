"""Tasks of lm-eval whose data are made on the spot, from the standard library of the running Python."""
