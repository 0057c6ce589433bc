"""Drop-in replacements for third-party samplers, with their signatures, defaults and return types.

At temperature 0 tokens equal the originals' on the same float32 model (`parity`); above it the noise is ours,
since theirs depends on the batch and the device. Masks that an original leaves are filled here.
"""
