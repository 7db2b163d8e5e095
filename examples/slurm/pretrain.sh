#!/bin/bash
# The curriculum on several nodes, in a container (enroot and pyxis): one torchrun a node, one rank a GPU.
#
#   export IMAGE=$PWD/megabyte-distill.sqsh DATA=/lustre/corpus RUNS=/lustre/runs
#   sbatch --nodes=4 examples/slurm/pretrain.sh --preset llama3.2-3b --load /runs/teacher --save /runs/first --bf16 \
#       --data-path /data/corpus_text_document --use-distributed-optimizer \
#       --overlap-grad-reduce --overlap-param-gather --recompute-byte-mixers
#
# Paths in the flags are those inside the container: DATA is /data, RUNS is /runs. Slurm's warning before the time limit
# is passed on, so that the ranks save and exit; the same command again goes on from there.
#SBATCH --job-name=megabyte-distill
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=4:00:00
#SBATCH --signal=TERM@300
set -euo pipefail

IMAGE=${IMAGE:?an enroot image, or REGISTRY#NAME:TAG}
GPUS=${GPUS:-8}
PORT=${PORT:-29500}
# not through head: it would end scontrol early, which pipefail takes for a failure
mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

CONTAINER_ARGS=(
    --container-image "$IMAGE"
    --container-mounts "${DATA:?the folder of the data sets}:/data,${RUNS:?the folder of the runs}:/runs"
    --container-workdir /opt/megabyte-distill
)
DISTRIBUTED_ARGS=(
    --nnodes "$SLURM_NNODES"
    --nproc-per-node "$GPUS"
    --rdzv-backend c10d
    --rdzv-id "$SLURM_JOB_ID"
    --rdzv-endpoint "${HOSTS[0]}:$PORT"
)

exec srun --kill-on-bad-exit=1 "${CONTAINER_ARGS[@]}" \
    torchrun "${DISTRIBUTED_ARGS[@]}" examples/pretrain_byte_kd.sh "$@"
