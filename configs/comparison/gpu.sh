#!/usr/bin/env bash
# Measures on one GPU, in some minutes: a step of distillation by DeepSpeed (ZeRO 0 to 3) and by plain torch; a client's
# round and step in fp32, TF32 and bf16, compiled and not, beside the same written by hand and stock peft; scoring; the
# exchange of GPT2-XL's prompts. Prints a line for each; what a command says is kept in FOLDER.
#   configs/comparison/gpu.sh FOLDER MODEL [KEY=VALUE ...]
#   configs/comparison/gpu.sh runs/gpu-speed HuggingFaceTB/SmolLM2-135M-Instruct data.task=sst2 data.max_length=128
# Without a GPU, to try the script: configs/comparison/gpu.sh runs/try embedded
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7s/^# //p' "$0" >&2; exit 2; }
folder=$1 model=$2
shift 2
few=${FEDSP_GPU_STEPS:-20} # distillation steps of the shorter of two runs, whose difference counts
mkdir -p "$folder"

settings=(--set "model.name=$model" --set "run.folder=$folder" --set data.limit.test=400 --set data.limit.validation=32)
for setting in "$@"; do settings+=(--set "$setting"); done

# speak NAME COMMAND...: keep what a command prints, and end with its last words if it fails.
speak() {
    local log=$folder/$1.txt
    shift
    "$@" >"$log" 2>&1 || { echo "failed: $*" >&2; tail -n 5 "$log" >&2; exit 1; }
}

# distil STEPS SETTING...: print the seconds of a distillation, in a run that does little else.
distil() {
    local steps=$1 name more=()
    name=$(printf -- '-%s' "$@")
    name=distil${name//[^[:alnum:]]/-}
    shift
    for setting in "$@"; do more+=(--set "$setting"); done
    speak "$name" python -m fedsp_mpi run "${settings[@]}" "${more[@]}" --name "$name" --replace \
        --set "distillation.stage.steps=$steps" --set distillation.reuse=false \
        --set federation.rounds=1 --set federation.clients=1 --set client.tuning.steps=1 --set server.tuning.steps=0 \
        --set evaluation.zero_shot=false --set evaluation.server_only=false
    sed -n 's/^distilled in .* steps, \([0-9.]*\) s, .*/\1/p' "$folder/$name.txt"
}

for engine in torch deepspeed; do
    for zero in 0 1 2 3; do
        [ "$engine" = deepspeed ] || [ "$zero" = 0 ] || continue
        choice=("distillation.engine=$engine" "distillation.zero_stage=$zero")
        short=$(distil "$few" "${choice[@]}")
        long=$(distil $((3 * few)) "${choice[@]}")
        awk -v a="$short" -v b="$long" -v n="$few" -v what="$engine, ZeRO $zero" \
            'BEGIN { printf "distillation step, %s: %.4f s\n", what, (b - a) / (2 * n) }'
    done
done
sed -n 's/^scored fedsp: \(.*\) questions in \(.*\) s$/scoring: \1 questions in \2 s/p' "$folder"/distil-"$few"-*-torch-*.txt

for compile in false true; do
    for precision in "float32 highest" "float32 high" "bfloat16 highest"; do
        read -r dtype matmul <<<"$precision"
        what="$dtype, matmul $matmul"
        [ "$compile" = false ] || what+=", compiled"
        speak "local-$dtype-$matmul-$compile" python -m fedsp_mpi bench local "${settings[@]}" --repeats 5 \
            --set "client.compute.dtype=$dtype" --set "client.compute.matmul_precision=$matmul" \
            --set "client.compute.compile=$compile"
        sed -n "s/^\(a client's local round\|passes of a tuning step\)/$what: &/p" "$folder/local-$dtype-$matmul-$compile.txt"
    done
done

speak wire mpirun -n 2 python -m fedsp_mpi bench wire --repeats 9
sed -n 's/^broadcast + gather/exchange: &/p' "$folder/wire.txt"
