#!/usr/bin/env bash
# Trains on the GPUs of several nodes under SLURM:
#
#   sbatch --nodes=2 examples/slurm.sh fsdp2 finetune --model_name_or_path … --dataset … --output_dir …
#
# The first argument is torchrun (data parallel) or a configuration of dllm_train/configs, the second a recipe;
# the rest are its options. Requeued jobs go on from their last checkpoint. Adapt the lines below to your cluster.
#SBATCH --job-name=dllm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail
export LAUNCH=${1:?torchrun or a configuration} RECIPE=${2:?finetune or pretrain}
shift 2

export PROCESSES_PER_NODE=${SLURM_GPUS_ON_NODE:-1}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_PER_TASK:-1} + PROCESSES_PER_NODE - 1) / PROCESSES_PER_NODE))}

# One task per node. SLURM_NODEID differs between them, so it is read inside the task, not here.
# shellcheck disable=SC2016
srun bash -c '
  set -euo pipefail
  if [ "$LAUNCH" = torchrun ]; then
    launch=(torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$PROCESSES_PER_NODE" --node-rank "$SLURM_NODEID"
      --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
  else
    launch=(accelerate launch --config_file "$(python -m dllm_train.configs "$LAUNCH")"
      --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * PROCESSES_PER_NODE))"
      --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
  fi
  exec "${launch[@]}" -m "dllm_train.recipes.$RECIPE" --resume_from_checkpoint last "$@"
' bash "$@"
