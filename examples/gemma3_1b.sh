#!/bin/bash
# Distil Gemma-3-1B into a byte-level model: all five stages with the paper's hyperparameters, on eight GPUs of 80 GB.
#
# 1. The teacher, converted once:   python tools/convert_checkpoint.py import --hf-model DIR --megatron-path CHECKPOINT
# 2. The text, preprocessed once:   python tools/preprocess_bytes.py --input … --output-prefix data/corpus \
#                                       --tokenizer-model DIR --workers 32
# 3. What it will need:             DRY_RUN=1 bash examples/gemma3_1b.sh       (no GPU, teacher or data needed)
# 4. The run, also to go on with:   CHECKPOINT=… DATA_PATH=data/corpus_text_document RUN=… bash examples/gemma3_1b.sh
#
# Further flags go behind and win: bash examples/gemma3_1b.sh --stages 1a,1b --1b.lr 1e-5
# Several machines: examples/multi_node.sh, examples/slurm/pretrain.sbatch. What to choose: docs/scaling.md
set -euo pipefail
cd "$(dirname "$0")/.."

CHECKPOINT=${CHECKPOINT:-checkpoints/gemma3-1b}      # your converted teacher
DATA_PATH=${DATA_PATH:-data/corpus_text_document}  # your data set's stem, or a blend: "0.7 stem1 0.3 stem2"
RUN=${RUN:-runs/gemma3-1b}                           # the run's folder

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NUM_NODES=${NUM_NODES:-1}
TP=${TP:-1}  # ranks that share a layer: within one machine
PP=${PP:-1}  # pipeline stages

DISTRIBUTED_ARGS=(--nproc-per-node "$GPUS_PER_NODE" --nnodes "$NUM_NODES")
if [[ -n "${RDZV_ENDPOINT:-}" ]]; then
    DISTRIBUTED_ARGS+=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-gemma3-1b}")
elif ((NUM_NODES > 1)) && [[ -z "${DRY_RUN:-}" ]]; then
    DISTRIBUTED_ARGS+=(--node-rank "${NODE_RANK:?}" --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:-29500}")
fi

MODEL_ARGS=(--preset gemma3-1b)

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
)
((TP == 1)) || MODEL_PARALLEL_ARGS+=(--sequence-parallel)

# 2,097,152 bytes an update in every stage: 131,072 × 16 where no backbone runs or trains, 8,192 × 256 where it trains
TRAINING_ARGS=(
    --bf16
    --train-iters 5000
    --micro-batch-size 1
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95
    --lr-decay-style cosine
    --1a.seq-length 131072 --1a.global-batch-size 16 --1a.lr 1e-3 --1a.lr-warmup-fraction 0.2 --1a.min-lr-ratio 0
    --1b.seq-length 8192 --1b.global-batch-size 256 --1b.lr 2e-5 --1b.lr-warmup-fraction 0.01 --1b.min-lr-ratio 0.1
    --1c.seq-length 131072 --1c.global-batch-size 16 --1c.lr 1e-3 --1c.lr-warmup-fraction 0.1 --1c.min-lr-ratio 0.1
    --2a.seq-length 131072 --2a.global-batch-size 16 --2a.lr 1e-3 --2a.lr-warmup-fraction 0.1 --2a.min-lr-ratio 0.1
    --2b.seq-length 8192 --2b.global-batch-size 256 --2b.lr 4e-5 --2b.backbone-lr 2e-5
    --2b.lr-warmup-fraction 0.01 --2b.min-lr-ratio 0.1 --2b.router-loss-weight 1.0
    --recompute-byte-mixers
)

read -r -a DATA_WORDS <<< "$DATA_PATH"
DATA_ARGS=(--data-path "${DATA_WORDS[@]}" --split 9990,8,2)

CHECKPOINT_ARGS=(--load "$CHECKPOINT" --save "$RUN" --save-interval 500 --keep-last-checkpoints 2)

LOGGING_ARGS=(--log-interval 10 --log-throughput --eval-interval 500 --eval-iters 4)

JOB=(
    examples/pretrain_byte_kd.sh
    "${MODEL_ARGS[@]}"
    "${MODEL_PARALLEL_ARGS[@]}"
    "${TRAINING_ARGS[@]}"
    "${DATA_ARGS[@]}"
    "${CHECKPOINT_ARGS[@]}"
    "${LOGGING_ARGS[@]}"
    "$@"
)

if [[ -n "${DRY_RUN:-}" ]]; then
    RANK=0 WORLD_SIZE=$((GPUS_PER_NODE * NUM_NODES)) exec python3 "${JOB[@]}" --dry-run
fi
exec torchrun "${DISTRIBUTED_ARGS[@]}" "${JOB[@]}"
