"""The steps of `dllm_train.convert`, one file each."""
