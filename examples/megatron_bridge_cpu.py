"""Megatron-Bridge on a machine without a GPU, for `megatron_bridge.py --cpu`."""

import functools
import sys
import types

from megatron_rltd.cpu import adapter

MODEL = dict(
    use_cpu_initialization=True,
    masked_softmax_fusion=False,
    gradient_accumulation_fusion=False,
    cross_entropy_loss_fusion=False,
    bias_dropout_fusion=False,
)


def enable() -> None:
    adapter.enable()
    import megatron.core.models.gpt
    import megatron.core.optimizer

    te = types.ModuleType("transformer_engine")
    te.pytorch = types.ModuleType("transformer_engine.pytorch")
    te.pytorch.ops = types.SimpleNamespace(Sequential=object)
    names = {"transformer_engine": te, "transformer_engine.pytorch": te.pytorch}
    sys.modules |= names
    import megatron.bridge
    for name in names:
        del sys.modules[name]
    from megatron_rltd.pretrain import compiled_helper
    compiled_helper.use(even_in_clone=False)
    import megatron.bridge.training.setup as setup
    from megatron.bridge.models.gpt_provider import local_layer_spec
    MODEL["transformer_layer_spec"] = local_layer_spec
    setup.initialize_megatron = functools.partial(setup.initialize_megatron, allow_no_cuda=True)
    setup.set_jit_fusion_options = lambda *args: None
