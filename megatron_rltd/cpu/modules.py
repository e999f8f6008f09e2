"""What Megatron takes from Apex or Transformer Engine on a GPU, here in plain torch for the CPU.

Streams, an Adam for the distributed optimizer, norms under sequence parallelism, unequal shares
over gloo, and a data loader that leaves the device's random numbers alone. Each function named
after a symbol of Megatron or torch is a `patching.Patch` wrapper.
"""

import contextlib
import functools
from typing import Any

import torch
from torch.optim.adam import adam

CPU = torch.device("cpu")


class Stream(contextlib.AbstractContextManager):
    """A CUDA stream or event on a device that runs everything in order: nothing to wait for."""

    def __init__(self, *args, **kwargs):
        self.cuda_stream = 0
        self.device = CPU

    def __exit__(self, *exc_info):
        return None

    def record_event(self, event: Any = None) -> "Stream":
        """Return an event that has happened."""
        return event or Stream()

    def query(self) -> bool:
        """Return that all work is done."""
        return True

    def elapsed_time(self, other: Any) -> float:
        """Return 0 ms: events carry no time on this device."""
        return 0.0

    def _done(self, *args, **kwargs) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _done


class GroupStepAdam(torch.optim.Optimizer):
    """Adam that counts steps per parameter group, as the FusedAdam of Apex and TE does.

    Megatron's distributed optimizer is written for that layout. With torch's own (a step tensor in
    each parameter's state) it cannot resume: its load gives all parameters one shared step tensor
    (``megatron/core/optimizer/distrib_optimizer.py``), which torch then increments once for each.

    Args:
        adam_w_mode: Decoupled weight decay (AdamW) if True, L2 regularisation (Adam) if False.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ):
        self.adam_w_mode = adam_w_mode
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            adam(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in params],
                fused=True,
                decoupled_weight_decay=self.adam_w_mode,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def data_loader_iter(original):
    """Keep the seed that a data loader draws out of the generator that dropout draws from.

    On a GPU these are two generators. Only the first of a group of tensor-parallel ranks reads
    data, so the others would drop out different elements of the same hidden states. A resumed run
    would also drop out different elements than an uninterrupted one.
    """

    @functools.wraps(original)
    def iterate(self):
        state = torch.get_rng_state()
        try:
            return original(self)
        finally:
            torch.set_rng_state(state)

    return iterate


def norm_under_sequence_parallel(original):
    """Let torch's norms run under sequence parallelism.

    Each TP rank sees s/t rows, so the gradients of the norm's parameters must be summed over TP
    ranks; Megatron does that for parameters marked ``sequence_parallel``
    (``megatron/core/distributed/finalize_model_grads.py``).
    """

    @functools.wraps(original)
    def new(cls, config, *args, **kwargs):
        if not config.sequence_parallel:
            return original(cls, config, *args, **kwargs)
        norm = original(cls, replaced(config, sequence_parallel=False), *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return staticmethod(new)


def replaced(config: Any, **changes: Any) -> Any:
    """Return a shallow copy of a config, changed without running its validation again."""
    copy = object.__new__(type(config))
    copy.__dict__.update(config.__dict__, **changes)
    return copy


def reduce_from_tensor_model_parallel_region(original):
    """Return the input itself if there is nothing to reduce.

    Megatron's autograd function returns it as a view of itself, which the MoE layer with biases
    then adds to in place: an error in torch. With TE's linear layers this does not arise.
    """

    @functools.wraps(original)
    def reduce(input_, group=None):
        from megatron.core.utils import get_tensor_model_parallel_group_if_none

        if get_tensor_model_parallel_group_if_none(group).size() == 1:
            return input_
        return original(input_, group)

    return reduce


def maybe_move_tensor_to_cpu(original):
    """Give MoE's all-to-all its split sizes as numpy, as `Tensor.is_cuda` makes it do on a GPU."""

    @functools.wraps(original)
    def move(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return move


def p2p_ops(original):
    """Send aliases between pipeline stages, so that the memory lives until it is sent.

    With interleaved stages Megatron 0.17 sets the ``.data`` of what it sends to an empty tensor
    without waiting (``megatron/core/pipeline_parallel/schedules.py:deallocate_output_tensor``).
    """

    @functools.wraps(original)
    def send_aliases(**kwargs):
        for name in ("tensor_send_prev", "tensor_send_next"):
            if kwargs[name] is not None:
                kwargs[name] = kwargs[name].detach()
        return original(**kwargs)

    return send_aliases


def gather_along_first_dim(original):
    """Gather unequal shares as equal ones, padded to the longest."""

    @functools.wraps(original)
    def gather(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        longest = max(output_split_sizes)
        parts = original(_padded(input_, longest), group).split(longest)
        return torch.cat([p[:n] for p, n in zip(parts, output_split_sizes, strict=True)])

    return gather


def reduce_scatter_along_first_dim(original):
    """Reduce and scatter unequal shares as equal ones, padded to the longest."""

    @functools.wraps(original)
    def reduce_scatter(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return original(input_, group, input_split_sizes, use_global_buffer)
        longest = max(input_split_sizes)
        shares = [_padded(share, longest) for share in input_.split(list(input_split_sizes))]
        return original(torch.cat(shares), group)[: input_split_sizes[group.rank()]]

    return reduce_scatter


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(length - rows.size(0), *rows.shape[1:])])


def local_modules(original):
    """Give a spec Megatron's own modules for those that are Transformer Engine's."""
    from megatron_rltd.cpu import transformer_engine

    return transformer_engine.local_modules(original)


def local_module(name):
    """Return a wrapper that replaces the Transformer Engine's class of that name."""

    def wrapper(original):
        from megatron_rltd.cpu import transformer_engine

        return transformer_engine.LOCAL[name]

    return wrapper


def layer_norm_linear(original):
    """Return the norm and linear layer in one that has Transformer Engine's parameters."""

    def column_parallel_layer_norm_linear(self):
        from megatron_rltd.cpu import transformer_engine

        return transformer_engine.LayerNormColumnParallelLinear

    return column_parallel_layer_norm_linear
