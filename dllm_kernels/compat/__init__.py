"""Others' samplers over ours: their signatures, defaults and return types.

At temperature 0 tokens are those of the originals on the same float32 model (`parity`); above it the noise is
ours, since theirs depends on the batch and the device. What an original leaves masked is filled here.
"""
