"""Quantization-aware training on a schedule: fake quantization goes in at ``start_epoch`` and stays."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightslim import deploy
from lightslim.errors import CompressionError
from lightslim.files import check_apart
from lightslim.infit import averaged_copies, evaluate, logged_names, probe_of, train_beside
from lightslim.quantize.analysis import check_outputs, signal_to_noise, unreached
from lightslim.quantize.numbers import fill, has_seen, in_steps, learned_by, learning, numbers, trained, unsaved
from lightslim.quantize.plan import Outputs, Settings, check_nodes, check_weights, plan_layers, plan_model
from lightslim.quantize.posttraining import calibrate
from lightslim.quantize.ranges import Range
from lightslim.quantize.transform import FakeQuantize, attach, quantized_layers, quantizers, untransform, watching
from lightslim.quantize.wiring import Between, between
from lightslim.registry import registry
from lightslim.steps import forward_probe, overrides
from lightslim.strategy import CompressionStrategy, changed_metrics, check_metric
from lightslim.tables import table


class QuantizationStrategy(CompressionStrategy):
    """Train with weights and inputs of convolutions and linear layers rounded as their integers will be.

    Checkpoints keep the full-precision weights under their plain names; the learned ranges are this strategy's state.

    Args:
        start_epoch: fake quantization goes in before the first step of this epoch, and stays to the end.
        end_epoch: when the models asked for are written; None for the end of training.
        float_model_save_path: where to write the model with weights on the grid; None for nowhere.
        mobile_model_save_path: where to write the model for mobile runtimes; None for nowhere.
        int8_model_save_path: where to write the integer model; None for nowhere.
        weight_bits: bits of a weight, 2 to 16; biases stay in float.
        activation_bits: bits of an input, 2 to 16; None leaves inputs as they come.
        weight_quantize_type: ``abs_max`` or ``channel_wise_abs_max``.
        activation_quantize_type: ``abs_max``, ``range_abs_max``, ``moving_average_abs_max``,
            ``moving_average_min_max`` (affine), or one for calibration: ``max``, ``percentile``, ``mse``, ``entropy``.
        save_in_nodes: inputs of ``forward`` or submodules at which a written model begins.
        save_out_nodes: submodules at which it ends.
        export_options: format to options of its exporter, as ``{"int8": {"deploy": "x86"}}``.
        skip: patterns of layer names that stay in float.
        overrides: pattern of layer names to the settings that differ there.
        weight_range: arguments of the weights' range.
        activation_range: arguments of the inputs' range, as ``{"rate": 0.99}``.
        calibration_batches: validation batches that the ranges see before the first step. What these do not reach is
            shown a few samples of the training data.
        outputs: patterns of names of modules whose outputs are quantized too: those that an addition reads. Or "auto",
            see :func:`quantize`.
        metric_name: a metric that the module logs, shown before and after.
        name: tells strategies of one class apart.

    Raises:
        CompressionError: bits out of bounds, an unknown range, two files in one place; in ``setup`` a start beyond the
            last epoch, a pattern that fits nothing or a model with nothing to quantize; when it begins, weights that
            are no numbers any more.

    Example:
        >>> QuantizationStrategy(start_epoch=2, weight_bits=4).must_be_last
        True
    """

    must_be_last: ClassVar[bool] = True

    def __init__(
        self,
        start_epoch: int = 0,
        end_epoch: int | None = None,
        float_model_save_path: str | None = None,
        mobile_model_save_path: str | None = None,
        int8_model_save_path: str | None = None,
        weight_bits: int = 8,
        activation_bits: int | None = 8,
        weight_quantize_type: str = "abs_max",
        activation_quantize_type: str = "abs_max",
        save_in_nodes: Sequence[str] | None = None,
        save_out_nodes: Sequence[str] | None = None,
        export_options: Mapping[str, Mapping[str, Any]] | None = None,
        skip: Sequence[str] = (),
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        weight_range: Mapping[str, Any] | None = None,
        activation_range: Mapping[str, Any] | None = None,
        calibration_batches: int = 8,
        outputs: Outputs = (),
        metric_name: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(start_epoch, end_epoch, name)
        self.settings = Settings(
            weight_bits,
            activation_bits,
            weight_quantize_type,
            activation_quantize_type,
            weight_range or {},
            activation_range or {},
        )
        self.skip, self.overrides = tuple(skip), dict(overrides or {})
        paths = {"float": float_model_save_path, "mobile": mobile_model_save_path, "int8": int8_model_save_path}
        self.save_paths = {format_: path for format_, path in paths.items() if path is not None}
        check_apart(self.save_paths.values())
        self.save_in_nodes, self.save_out_nodes = save_in_nodes, save_out_nodes
        self.export_options = dict(export_options or {})
        if calibration_batches < 0:
            raise CompressionError(f"calibration_batches is {calibration_batches}; it must be 0 or more")
        self.calibration_batches = calibration_batches
        self.outputs: Outputs = outputs if isinstance(outputs, str) else tuple(outputs)
        self.metric_name = metric_name
        self._quantizers: dict[str, FakeQuantize] = {}
        self._layers: Mapping[str, nn.Module] = {}
        self._ranges: Mapping[str, Mapping[str, Tensor]] = {}
        self._between = Between()

    @override
    def state_dict(self) -> dict[str, Any]:
        between = {name: list(names) for name, names in vars(self._between).items()}
        return {**super().state_dict(), "ranges": self.ranges(), "between": between}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._learn_from(state_dict)

    def _learn_from(self, state: Mapping[str, Any]) -> None:
        self._ranges = state["ranges"]
        # Older checkpoints know of none
        self._between = Between(**{name: tuple(names) for name, names in state.get("between", {}).items()})

    def ranges(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What the ranges have learned: quantizer name to its numbers."""
        return learned_by(self._quantizers) or self._ranges

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if not self._begun:  # another module may have taught it some
                self._ranges, self._between = {}, Between()
            for format_, options in self._formats().items():
                exporter = registry().get("exporter", format_)
                exporter.check_available()
                exporter.check_options(options)
            # Of one that is not whole yet nothing can be said before it is
            if not any(overrides(pl_module, hook) for hook in ("setup", "configure_model")):
                self._check(pl_module)
        elif self._begun:
            self._arm(trainer, pl_module)

    def _check(self, module: LightningModule) -> None:
        """Raise unless ``module`` has what the arguments speak of."""
        layers, outputs = self._plans(module)
        self._check_calibration({**layers, **outputs})
        check_nodes(module, self.save_in_nodes, "save_in_nodes")
        check_nodes(module, self.save_out_nodes, "save_out_nodes")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self._begun:
            self._arm(trainer, pl_module)
            idle = next(record["idle"] for record in self.history if record["act"] == "quantize")
            train_beside(trainer, trained(pl_module, idle))
        else:
            self._check(pl_module)

    @override
    def figures(self) -> Mapping[str, float]:
        learned = {name: numbers(quantizer).get("rule.amax") for name, quantizer in self._quantizers.items()}
        return {f"ranges/{name}": float(amax.detach().max()) for name, amax in learned.items() if amax is not None}

    @override
    def distributions(self) -> Mapping[str, Tensor]:
        """Weights in steps of their grid, whose lines lie at whole numbers: of the layers that lose most by it."""
        noise: Mapping[str, float] = next(
            (record["signal_to_noise"] for record in self.history if "signal_to_noise" in record), {}
        )
        return {f"weights_in_steps/{name}": in_steps(self._layers[name]) for name in list(noise)[:4]
                if name in self._layers}  # fmt: skip

    def _plans(self, module: nn.Module) -> tuple[dict[str, Settings], dict[str, Settings]]:
        """How the layers of ``module`` are quantized, and the outputs."""
        return plan_model(module, self.settings, self.skip, self.overrides, self.outputs, lambda _: self._between)

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        """Find what there is to round between layers, where that was left to us."""
        if self.outputs == "auto":
            probe = forward_probe(module, deploy.forward_inputs(trainer, module))
            layers = plan_layers(module, self.settings, self.skip, self.overrides)
            found = between(module, lambda within: probe.run(within=within), layers)
            self._between = trainer.strategy.broadcast(found)

    def _formats(self) -> dict[str, dict[str, Any]]:
        """The formats asked for, each with its options; only those that hold a program can be cut."""
        unasked = next((name for name in self.export_options if name not in self.save_paths), None)
        if unasked is not None:
            raise CompressionError(f"export_options: no {unasked}_model_save_path is given")
        nodes = {"save_in_nodes": self.save_in_nodes, "save_out_nodes": self.save_out_nodes}
        cuts = {name: list(value) for name, value in nodes.items() if value}
        return {
            format_: {
                **(cuts if registry().get("exporter", format_).cuts else {}),
                **self.export_options.get(format_, {}),
            }
            for format_ in self.save_paths
        }

    def _check_calibration(self, plan: Mapping[str, Settings], batches: int | None = None) -> None:
        batches = self.calibration_batches if batches is None else batches
        rounding = {name: settings for name, settings in plan.items() if settings.rounds_inputs}
        blind = next((name for name, settings in rounding.items() if settings.activation_rule().calibrated), None)
        if blind is not None and not batches:
            raise CompressionError(
                f"{plan[blind].activation_quantize_type} learns in calibration only, and there are no "
                "calibration_batches: give some, and validation data, or take moving_average_abs_max"
            )

    @override
    def evaluate_as(self, trainer: Trainer, pl_module: LightningModule, state: Mapping[str, Any] | None) -> None:
        if state is None:
            if self._begun:
                rank_zero_warn(f"{self.name}: the checkpoint holds no ranges; those of the last run are used")
            return
        self._disarm(trainer, pl_module)
        if state["begun"]:
            self._learn_from(state)
            self._arm(trainer, pl_module)

    def _arm(self, trainer: Trainer, module: nn.Module) -> None:
        """Put fake quantization into ``module``, with what its ranges have learned so far.

        Averaging callbacks pair the tensors of their copies with the module's by position: they get the same.
        """
        for each in (module, *averaged_copies(trainer)):
            attach(each, *self._plans(each))
            for name, quantizer in quantizers(each):
                fill(quantizer, self._ranges.get(name, {}))
                unsaved(quantizer)
        self._quantizers, self._layers = dict(quantizers(module)), quantized_layers(module)

    def _disarm(self, trainer: Trainer, module: nn.Module) -> None:
        self._ranges, self._quantizers, self._layers = self.ranges(), {}, {}
        for each in (module, *averaged_copies(trainer)):
            untransform(each)

    @override
    def rehearse(self, trainer: Trainer, pl_module: LightningModule) -> str:
        check_metric(self.metric_name, logged_names(trainer, pl_module, probe_of(trainer, pl_module)))
        self._look(trainer, pl_module)
        layers, outputs = self._plans(pl_module)
        check_outputs(probe_of(trainer, pl_module), pl_module, outputs)
        # What starts later may have learned by then
        check_weights(pl_module, layers, zeros_allowed=self.start_epoch > 0)
        if not evaluate(trainer, pl_module, limit=1):
            self._check_calibration({**layers, **outputs}, batches=0)
        if self.save_paths:
            trial = attach(copy.deepcopy(pl_module), layers, outputs).eval()
            trial._trainer = trainer
            inputs = deploy.forward_inputs(trainer, trial)
            calibrate(trial, forward_probe(trial, inputs).evaluate)
            deploy.rehearse(trainer, trial, inputs, self._formats(), list(self.save_paths.values()))
        rows = [(name, str(s.weight_bits), s.weight_quantize_type, *_activation(s)) for name, s in layers.items()]
        rows += [(f"{name}, its output", "", "", *_activation(s)) for name, s in outputs.items()]
        return f"{len(layers)} layers\n" + table(("layer", "weight bits", "range", "bits of values", "range"), rows)

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        before = evaluate(trainer, pl_module)
        self._look(trainer, pl_module)
        check_weights(pl_module, self._plans(pl_module)[0], zeros_allowed=True)
        self._arm(trainer, pl_module)
        self._calibrate(trainer, pl_module)
        idle = unreached(probe_of(trainer, pl_module), pl_module)
        if idle:
            rank_zero_warn(f"{self.name}: the inputs of {', '.join(idle)} are not quantized: the step never calls them")
        for each in averaged_copies(trainer):
            for name, quantizer in quantizers(each):
                fill(quantizer, numbers(self._quantizers[name]))
        train_beside(trainer, trained(pl_module, idle))
        after = evaluate(trainer, pl_module)
        noise = signal_to_noise(pl_module, probe_of(trainer, pl_module).run)
        changed = changed_metrics(before, after, self.metric_name)
        count = len(quantized_layers(pl_module))
        rank_zero_info(f"{self.name}, epoch {trainer.current_epoch}: {count} layers quantized{changed}")
        metrics = {"before": before, "after": after}
        return {"act": "quantize", "quantized": count, "idle": idle, "signal_to_noise": noise, "metrics": metrics}

    def _calibrate(self, trainer: Trainer, module: LightningModule) -> None:
        """Let the ranges see validation data, and those that this leaves without any some training data."""
        rules = [quantizer.rule for quantizer in self._quantizers.values()]
        if self.calibration_batches:
            with watching(module):
                evaluate(trainer, module, limit=self.calibration_batches, learning=rules)
        synchronize(trainer, rules)
        blind = {name: quantizer for name, quantizer in self._quantizers.items() if not has_seen(quantizer)}
        if trainer.strategy.reduce_boolean_decision(bool(blind), all=False):
            learned: dict[str, dict[str, Tensor]] = {}
            with watching(module):
                probe_of(trainer, module).run(training=True, within=learning(blind, learned))
            for name, quantizer in blind.items():
                fill(quantizer, learned[name])
        synchronize(trainer, rules)

    @override
    def finish(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any] | None:
        return self._export(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After on_train_end, in which averaging callbacks put the average in place
        written = [record["step"] for record in self.history if record["act"] == "export"]
        if self._begun and trainer.global_step not in written and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._note(trainer, self._export(trainer, pl_module))

    def _export(self, trainer: Trainer, module: LightningModule) -> dict[str, Any] | None:
        """Write the files asked for."""
        files = {format_: deploy.write(trainer, module, format_, self.save_paths[format_], options)
                 for format_, options in self._formats().items()}  # fmt: skip
        return {"act": "export", "files": files} if files else None

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        synchronize(trainer, [quantizer.rule for quantizer in self._quantizers.values()])

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._disarm(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._disarm(trainer, pl_module)


def _activation(settings: Settings) -> tuple[str, str]:
    """How values are quantized, as text."""
    if not settings.rounds_inputs:
        return "as they come", ""
    return str(settings.activation_bits), settings.activation_quantize_type


def synchronize(trainer: Trainer, rules: Sequence[Range]) -> None:
    """Give all processes the widest of their ranges, in one collective."""
    buffers = [buffer for rule in rules for buffer in rule.agreed()]
    if trainer.world_size == 1 or not buffers:
        return
    joined = trainer.strategy.reduce(torch.cat([buffer.flatten() for buffer in buffers]), reduce_op="max")
    for buffer, part in zip(buffers, joined.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.reshape(buffer.shape))
