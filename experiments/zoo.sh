#!/usr/bin/env bash
# Every run of the zoo, three seeds each, into the folder given (default: runs/zoo), then the table in README.md. It goes
# on where it was interrupted. About three minutes for each epoch of ResNet-20 and two of the others on one CPU core.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/zoo}

zoo() {  # NAME RECIPE [ARGUMENT ...]
    lightslim run "experiments/$2/recipe.yaml" --seeds 3 --out "$out/$1" "${@:3}"
}

teacher() {  # NAME [ARGUMENT ...]
    [ -f "runs/$1/result.json" ] || lightslim run experiments/mobilenet_v1_distill/teacher.yaml --out "runs/$1" "${@:2}"
}

ratios="strategies.halve.target_ratio=0.5,0.6,0.7"
teacher teacher
teacher teacher_wide --set model.width=2
for network in mobilenet_v1 mobilenet_v2 resnet20; do
    case $network in
        mobilenet_v1) size=(--set model.network=$network --set model.width=0.375) params='".*pointwise.weight"' wide=() ;;
        mobilenet_v2) size=(--set model.network=$network --set model.width=0.5) params='"*expand.weight"' wide=() ;;
        resnet20) size=(--set model.network=$network --set model.width=1) params='"*conv*.weight"'
            wide=(--set teacher.width=2 --set teacher.checkpoint=runs/teacher_wide/checkpoints/last.ckpt) ;;
    esac
    distil=(--set compressor.epoch=10 --set strategies.distil.end_epoch=10)
    qat=(--set compressor.epoch=10 --set strategies.quantize.start_epoch=9 --set 'model.restarts=[9]')
    zoo $network-baseline ${network}_uniform --set 'compressor.strategies=[]'
    zoo $network-uniform ${network}_uniform --sweep "$ratios"
    zoo $network-sensitive ${network}_sensitive
    zoo $network-qat ${network}_qat "${qat[@]}"
    zoo $network-qat-tensor ${network}_qat "${qat[@]}" --set strategies.quantize.weight_quantize_type=abs_max \
        --sweep strategies.quantize.activation_quantize_type=moving_average_abs_max,abs_max
    zoo $network-distil mobilenet_v1_distill "${size[@]}" "${wide[@]}" "${distil[@]}"
    zoo $network-prune-qat prune_qat "${size[@]}" --set "strategies.halve.pruned_params=$params"
    zoo $network-distil-qat distil_qat "${size[@]}" "${wide[@]}"
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
