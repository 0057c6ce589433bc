"""Print the path of a configuration: accelerate launch --config_file $(python -m dllm_train.configs ddp)."""

import sys

from dllm_train.configs import config_path

try:
    (name,) = sys.argv[1:] or ("",)
    print(config_path(name))
except ValueError as error:
    sys.exit(f"python -m dllm_train.configs NAME: {error}")
