#!/usr/bin/env bash
# Every run of the zoo, into the folder given (default: runs/zoo), then the table in README.md. It goes on where it was
# interrupted: a finished run is skipped, another one resumed. An epoch here sees half of the training images. A method
# begins with the weights of its seed's baseline, distillation at the beginning. One CPU core needs half a minute to a
# minute for an epoch; SEEDS="0" is a third of it, EPOCHS=8 takes longer to better baselines.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/zoo} epochs=${EPOCHS:-4}

zoo() {  # FOLDER RECIPE [ARGUMENT ...]
    [ -f "$1/result.json" ] || lightslim run "experiments/$2/recipe.yaml" --out "$1" --resume auto \
        --set trainer.limit_train_batches=0.5 "${@:3}"
}

network_of() {  # NETWORK: its size, the parameters to cut by, its teacher
    case $1 in
        mobilenet_v1) width=0.375 params='".*pointwise.weight"' teacher=("$out/resnet20-baseline-0" 1) ;;
        mobilenet_v2) width=0.25 params='"*expand.weight"' teacher=("$out/resnet20-baseline-0" 1) ;;
        resnet20) width=1 params='"*conv*.weight"' teacher=("$out-teacher" 1.5) ;;
    esac
    size=(--set model.network="$1" --set model.width=$width)
    taught=(--set teacher.width="${teacher[1]}" --set teacher.checkpoint="${teacher[0]}/checkpoints/last.ckpt")
}

methods() {  # NETWORK SEED
    network_of "$1"
    local seed=(--set compressor.seed="$2") whole=(--set compressor.epoch="$epochs" --set 'model.restarts=[]')
    local heal=(--set compressor.epoch=2 --set 'model.restarts=[]' --set model.learning_rate=0.05 --set strategies.halve.start_epoch=0)
    local tune=(--set compressor.epoch=1 --set 'model.restarts=[]' --set model.learning_rate=0.01 --set strategies.quantize.start_epoch=0)
    zoo "$out/$1-baseline-$2" "$1_uniform" "${size[@]}" "${seed[@]}" "${whole[@]}" --set 'compressor.strategies=[]'
    local from=("${seed[@]}" --set compressor.init_model="$out/$1-baseline-$2/checkpoints/last.ckpt")
    for ratio in 0.5 0.6 0.7; do
        zoo "$out/$1-uniform-$ratio-$2" "$1_uniform" "${size[@]}" "${from[@]}" "${heal[@]}" --set strategies.halve.target_ratio=$ratio
    done
    zoo "$out/$1-sensitive-$2" "$1_sensitive" "${size[@]}" "${from[@]}" "${heal[@]}"
    for ranges in channel_wise_abs_max/moving_average_abs_max abs_max/moving_average_abs_max abs_max/abs_max; do
        zoo "$out/$1-qat-${ranges/\//-}-$2" "$1_qat" "${size[@]}" "${from[@]}" "${tune[@]}" \
            --set strategies.quantize.weight_quantize_type="${ranges%/*}" \
            --set strategies.quantize.activation_quantize_type="${ranges#*/}"
    done
    zoo "$out/$1-prune-qat-$2" prune_qat "${size[@]}" "${from[@]}" "${heal[@]}" --set compressor.epoch=3 \
        --set "strategies.halve.pruned_params=$params" --set strategies.quantize.start_epoch=2 \
        --set 'model.restarts=[2]' --set model.restart_scale=0.2
    zoo "$out/$1-distil-$2" mobilenet_v1_distill "${size[@]}" "${seed[@]}" "${taught[@]}" "${whole[@]}" \
        --set strategies.distil.end_epoch="$epochs"
    zoo "$out/$1-distil-qat-$2" distil_qat "${size[@]}" "${seed[@]}" "${taught[@]}" --set compressor.epoch=$((epochs + 1)) \
        --set strategies.distil.end_epoch="$epochs" --set strategies.quantize.start_epoch="$epochs" \
        --set "model.restarts=[$epochs]" --set model.restart_scale=0.1
}

zoo "$out-teacher" resnet20_uniform --set model.width=1.5 --set compressor.epoch="$epochs" \
    --set 'model.restarts=[]' --set 'compressor.strategies=[]'
for seed in ${SEEDS:-0 1 2}; do
    for network in resnet20 mobilenet_v1 mobilenet_v2; do methods $network "$seed"; done
done

# A float and, of what is quantized, an integer file of each run
find "$out" -name result.json | sort | while read -r result; do
    run=$(dirname "$result")
    [ -f "$run/exports/float.onnx" ] || lightslim export "$run/checkpoints/last.ckpt" --as onnx "$run/exports/float.onnx"
    if grep -q '"QuantizationStrategy"' "$result" && ! [ -f "$run/exports/int8.onnx" ]; then
        lightslim export "$run/checkpoints/last.ckpt" --as int8 "$run/exports/int8.onnx" --option deploy=x86
    fi
done
python -m experiments.zoo "$out"
