"""Megatron's own modules in the place of those that it takes from Transformer Engine.

Megatron's HybridModel is specified with classes of Transformer Engine only. Without it, Megatron
defines them as mocks, and building a model fails. Here each has a counterpart of plain torch, whose
parameters, sharded-state keys and gradient marks are those of the class that it replaces
(``megatron/core/extensions/transformer_engine.py``), so that checkpoints go both ways.

Import this only after Megatron: it imports Megatron's classes. Shapes below: s sequence, b micro
batch, h hidden size, t tensor-parallel size.
"""

import dataclasses
import functools
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import _initialize_affine_weight_cpu
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn import functional


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """A norm and a column-parallel linear layer, as TELayerNormColumnParallelLinear.

    Attributes:
        layer_norm_weight: [h], as the norm's that Megatron would build before the layer.
        layer_norm_bias: [h], or None for RMSNorm.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any):
        super().__init__(input_size, output_size, config=config, **kwargs)
        norm = WrappedTorchNorm(config, input_size, config.layernorm_epsilon)
        # First, as in Transformer Engine: the distributed optimizer's buffers keep this order.
        own = dict(self._parameters)
        self._parameters.clear()
        self.layer_norm_weight = norm.weight
        self.register_parameter("layer_norm_bias", getattr(norm, "bias", None))
        self._parameters.update(own)

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any):
        """Return the linear layer of the normalized [s, b, h] or [s/t, b, h], and its bias."""
        shape, eps = (self.input_size,), self.config.layernorm_epsilon
        if self.config.normalization == "RMSNorm":
            normed = functional.rms_norm(input_, shape, self.layer_norm_weight, eps)
        else:
            weight, bias = self.layer_norm_weight, self.layer_norm_bias
            normed = functional.layer_norm(input_, shape, weight, bias, eps)
        return super().forward(normed, *args, **kwargs)


class DuplicatedLinear(torch.nn.Module):
    """A linear layer that every tensor-parallel rank holds whole, as a duplicated TELinear.

    Under sequence parallelism each rank sees s/t rows, so Megatron sums the gradients over them.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str,
        config: Any,
        init_method: Any,
        bias: bool,
        skip_bias_add: bool,
        tp_group: Any = None,
        **kwargs: Any,
    ):
        if parallel_mode != "duplicated":
            raise ValueError(f"parallel_mode {parallel_mode}: only duplicated is known")
        super().__init__()
        self.bias: torch.nn.Parameter | None
        self.skip_bias_add = skip_bias_add
        self.tp_group = tp_group or parallel_state.get_tensor_model_parallel_group()
        dtype = config.params_dtype
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=dtype))
        if config.perform_initialization:
            _initialize_affine_weight_cpu(
                self.weight,
                output_size,
                input_size,
                output_size,
                0,
                init_method,
                params_dtype=dtype,
                rank=0,
                world_size=1,
                skip_set_tensor_parallel_attributes=True,
            )
        zeros = torch.nn.Parameter(torch.zeros(output_size, dtype=dtype)) if bias else None
        self.register_parameter("bias", zeros)
        marks = {"allreduce": True, "tensor_model_parallel": False}
        for parameter in self.parameters():
            vars(parameter).update(marks, sequence_parallel=config.sequence_parallel)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output, and the bias if it is for the caller to add."""
        if self.skip_bias_add:
            return functional.linear(input_, self.weight), self.bias
        return functional.linear(input_, self.weight, self.bias), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Return the parameters as equal on all tensor-parallel ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            None,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )

    def get_extra_state(self) -> None:
        """Keep the key that a TELinear has in a checkpoint, without a value."""

    def set_extra_state(self, state: Any) -> None:
        """Ignore what Transformer Engine stores for FP8."""


LOCAL: dict[str, Any] = {
    "TENorm": WrappedTorchNorm,
    "TELinear": DuplicatedLinear,
    "TEColumnParallelLinear": ColumnParallelLinear,
    "TERowParallelLinear": RowParallelLinear,
    "TELayerNormColumnParallelLinear": LayerNormColumnParallelLinear,
    "TEDotProductAttention": DotProductAttention,
}


def local_modules(spec: Any) -> Any:
    """Return a copy of a spec, or of a part of one, with the classes of `LOCAL` in it."""
    for name, local in LOCAL.items():
        if spec is getattr(transformer_engine, name):
            return local
    if isinstance(spec, functools.partial):
        keywords = {name: local_modules(value) for name, value in spec.keywords.items()}
        return functools.partial(spec.func, *spec.args, **keywords)
    if isinstance(spec, list):
        return [local_modules(part) for part in spec]
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        fields = [field.name for field in dataclasses.fields(spec)]
        parts = {name: local_modules(getattr(spec, name)) for name in fields}
        return dataclasses.replace(spec, **parts)
    return spec
