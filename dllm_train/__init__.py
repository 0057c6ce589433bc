"""Training of diffusion language models: noise, objectives, data and runnable recipes."""

from dllm_train.noise import Noise, Schedule, sample_noise
from dllm_train.objectives import LossOutput, bd3lm_loss, mdlm_loss

__all__ = ["LossOutput", "Noise", "Schedule", "bd3lm_loss", "mdlm_loss", "sample_noise"]
