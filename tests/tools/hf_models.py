"""Small random models of Hugging Face's, and what Megatron makes of a checkpoint."""

import os
import sys
from pathlib import Path

import numpy as np
import torch

VOCABULARY, SEQ = 127, 64
TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, (3, SEQ))
ENDS = {"bos_token_id": None, "eos_token_id": None}


def scattered(model):
    """Return a model whose parameters are all away from their initial values, ones and zeros."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_positions": SEQ, "n_embd": 32, "n_layer": 3, "n_head": 4}
    return scattered(GPT2LMHeadModel(GPT2Config(**{**sizes, **ENDS, **options})))


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": SEQ,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }
    return scattered(LlamaForCausalLM(LlamaConfig(**{**sizes, **ENDS, **options})))


def hugging_face_logits(folder: Path) -> np.ndarray:
    """Return the logits [b, s, v] of `TOKENS`, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval().double()
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def megatron_logits(load: str, flags: list[str], output: str) -> None:
    """Be a rank of a Megatron that loads a checkpoint; write the logits of `TOKENS`, in float64.

    The arguments are the checkpoint's, as with --use-checkpoint-args, and Megatron builds and loads
    the model.
    """
    from megatron_rltd.cpu import adapter

    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    torch.set_num_threads(1)
    # It needs no GPU where torch.compile is off, and is what makes GELU the tanh approximation.
    adapter.CPU_ARGUMENTS.pop("bias_gelu_fusion", None)
    adapter.enable()
    from megatron.core import mpu, tensor_parallel
    from megatron.training import arguments, checkpointing, global_vars

    from megatron_rltd.pretrain.model_provider import model_provider

    sys.argv = ["pretrain_gpt.py", "--load", load, "--finetune", "--micro-batch-size", "1", *flags]
    args = arguments.parse_args()
    args, _ = checkpointing.load_args_from_checkpoint(args)
    arguments.validate_args(args)
    global_vars.set_args(args)
    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel(args.tensor_model_parallel_size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = model_provider()
    checkpointing.load_checkpoint([model], None, None)
    model = model.eval().double()
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad():
        logits = model(tokens, torch.arange(SEQ).expand_as(tokens), None)
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
    if torch.distributed.get_rank() == 0:
        np.save(output, logits.numpy())
