"""Random calls of the operators and the sampler, valid and invalid; tools/fuzz.py runs them."""
