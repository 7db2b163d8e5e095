#!/bin/bash
# lm-evaluation-harness on a student: the tasks of the papers on byte-level models, with their shots.
#
#   pip install '.[eval]'                           once
#   STUDENT=RUN bash examples/lm_eval.sh            a run, one of its stages (RUN/2a), or an exported folder
#   TEACHER=DIR bash examples/lm_eval.sh            the Hugging Face teacher on the same tasks
#   DRY_RUN=1 STUDENT=RUN bash examples/lm_eval.sh  prints the commands
#
# Further flags go to the harness: STUDENT=RUN bash examples/lm_eval.sh --limit 100
# The harness fetches its tasks' data from a hub. Without one, ZERO_SHOT="my_task" FIVE_SHOT="" INCLUDE=TASKS takes task
# files of your own that read local files (docs/evaluation.md).
#
# What is confirmed: a public index of results lists HellaSwag, PIQA, ARC, WinoGrande, OpenBookQA, LAMBADA, Social IQA,
# CommonsenseQA and MMLU for arXiv 2602.01007. BoolQ is other papers'. The shots (5 for MMLU, 0 for all others) are the
# usual ones; we have not seen the paper's own words on them, nor on its metrics.
set -euo pipefail
cd "$(dirname "$0")/.."

STUDENT=${STUDENT:-}
TEACHER=${TEACHER:-}
OUT=${OUT:-results/lm_eval}
PATHS=${PATHS:-4}            # bit histories of the causal byte filter
BATCH_SIZE=${BATCH_SIZE:-32} # rows side by side
INCLUDE=${INCLUDE:-}         # a folder of task files
ZERO_SHOT=${ZERO_SHOT-lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande,openbookqa,social_iqa,commonsense_qa,boolq}
FIVE_SHOT=${FIVE_SHOT-mmlu}

if [[ -z "$STUDENT$TEACHER" ]]; then
    echo "give STUDENT=RUN (or an exported folder), TEACHER=DIR, or both" >&2
    exit 2
fi

evaluate() { # name, shots, tasks, then the words that start the harness with a model
    local name=$1 shots=$2 tasks=$3
    local command=("${@:4}" --tasks "$tasks" --num_fewshot "$shots" --batch_size "$BATCH_SIZE" --output_path "$OUT/$name")
    [[ -z "$INCLUDE" ]] || command+=(--include_path "$INCLUDE")
    command+=("${MORE[@]}")
    if [[ -n "${DRY_RUN:-}" ]]; then
        echo "${command[*]}"
    else
        "${command[@]}"
    fi
}

MORE=("$@")
MEGABYTE=(python3 -m megabyte_distill.harness --model megabyte --model_args "path=$STUDENT,paths=$PATHS")
TOKENS=(python3 -m lm_eval --model hf --model_args "pretrained=$TEACHER")
for set in "0 $ZERO_SHOT" "5 $FIVE_SHOT"; do
    read -r shots tasks <<< "$set"
    [[ -n "$tasks" ]] || continue
    [[ -z "$STUDENT" ]] || evaluate "student_${shots}shot" "$shots" "$tasks" "${MEGABYTE[@]}"
    [[ -z "$TEACHER" ]] || evaluate "teacher_${shots}shot" "$shots" "$tasks" "${TOKENS[@]}"
done
