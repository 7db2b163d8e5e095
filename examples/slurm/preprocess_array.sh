#!/bin/bash
# Preprocess a corpus of many files on many machines: an array job writes a partition a task, one more job merges them.
#
#   export INPUT='shards/*.jsonl.zst' TOKENIZER=path/to/teacher OUTPUT_PREFIX=data/corpus
#   jobid=$(sbatch --parsable --array=0-31 examples/slurm/preprocess_array.sh)
#   sbatch --dependency=afterok:$jobid examples/slurm/preprocess_array.sh merge
#
# A task that was interrupted is started again with its number (sbatch --array=7 … with SLURM_ARRAY_TASK_COUNT=32 exported
# as PARTITIONS=32); finished partitions are left as they are. JSON_KEYS="text title" reads other keys, MORE holds further flags.
#SBATCH --job-name=preprocess-bytes
#SBATCH --nodes=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
set -euo pipefail

PYTHON=${PYTHON:-python}
OUTPUT_PREFIX=${OUTPUT_PREFIX:?names the data set to write}
read -r -a KEY_ARGS <<< "--json-keys ${JSON_KEYS:-text}"
read -r -a MORE_ARGS <<< "${MORE:-}"

if [[ "${1:-}" == merge ]]; then
    exec "$PYTHON" tools/preprocess_bytes.py merge --output-prefix "$OUTPUT_PREFIX" "${KEY_ARGS[@]}"
fi

exec "$PYTHON" tools/preprocess_bytes.py \
    --input "${INPUT:?files, a glob or a directory}" \
    --tokenizer-model "${TOKENIZER:?the teacher\'s folder or tokenizer file}" \
    --output-prefix "$OUTPUT_PREFIX" \
    --partitions "${PARTITIONS:-$SLURM_ARRAY_TASK_COUNT}" \
    --partition-index "$SLURM_ARRAY_TASK_ID" \
    --workers "${SLURM_CPUS_PER_TASK:-1}" \
    --resume "${KEY_ARGS[@]}" "${MORE_ARGS[@]}"
