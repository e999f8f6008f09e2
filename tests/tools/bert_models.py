"""Small MegatronBerts of transformers, and what Megatron's BertModel makes of a checkpoint."""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from tests.tools.hf_models import ENDS, SEQ, TOKENS, VOCABULARY, scattered

TYPES = (np.arange(SEQ) >= 20).astype(int).repeat(3).reshape(SEQ, 3).T
MASK = (np.arange(SEQ) < np.array([[SEQ], [40], [7]])).astype(int)


def bert(kind="MegatronBertForPreTraining", **options):
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "max_position_embeddings": SEQ,
        "initializer_range": 0.1,
    }
    config = transformers.MegatronBertConfig(**{**sizes, **ENDS, **options})
    return scattered(getattr(transformers, kind)(config))


def hugging_face_outputs(folder: Path) -> dict[str, np.ndarray]:
    """Return the logits of `TOKENS` in float64: mlm [b, s, v] and, if there, sop [b, 2]."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model = model.eval().double()
    tokens, mask, types = map(torch.from_numpy, (TOKENS, MASK, TYPES))
    with torch.no_grad():
        said = model(tokens, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
    hidden = said.hidden_states[-1].numpy()
    if "logits" in said:
        return {"mlm": said.logits.numpy(), "hidden": hidden}
    return {
        "mlm": said.prediction_logits.numpy(),
        "sop": said.seq_relationship_logits.numpy(),
        "hidden": hidden,
    }


def megatron_outputs(flags: list[str], output: str, load: str = "", save: str = "") -> None:
    """Be a rank of a Megatron with a BertModel; write its logits of `TOKENS`, in float64.

    Args:
        flags: The model, or what is beyond the arguments of the checkpoint.
        output: An .npz of mlm [b, s, v], hidden [b, s, h] and, with a binary head, sop [b, 2].
        load: A checkpoint; without, the model is random, equal on all layouts of one TP size.
        save: Where to save one.
    """
    from megatron_rltd.cpu import adapter

    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    torch.set_num_threads(1)
    adapter.CPU_ARGUMENTS.pop("bias_gelu_fusion", None)  # what makes GELU the tanh approximation
    adapter.enable()
    from megatron.core import mpu, tensor_parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.training import arguments, checkpointing, global_vars

    sys.argv = ["pretrain_bert.py", "--micro-batch-size", "1", "--spec", "local", *flags]
    sys.argv += ["--load", load, "--finetune"] if load else []
    sys.argv += (
        ["--save", save, "--save-interval", "1", "--ckpt-format", "torch_dist"] if save else []
    )
    args = arguments.parse_args()
    if load:
        args, _ = checkpointing.load_args_from_checkpoint(args)
    arguments.validate_args(args)
    global_vars.set_args(args)
    torch.distributed.init_process_group("gloo")
    mpu.initialize_model_parallel(
        args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = BertModel(
        arguments.core_transformer_config_from_args(args),
        num_tokentypes=2 if args.bert_binary_head else 0,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        add_binary_head=args.bert_binary_head,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
    )
    if load:
        checkpointing.load_checkpoint([model], None, None)
    else:
        scattered(model)
    if save:
        filesystem_async.get_write_results_queue("fork")  # which would else import torch again
        checkpointing.save_checkpoint(1, [model], None, None, 0)
    if args.pipeline_model_parallel_size > 1:
        return
    model = model.eval().double()
    seen = []
    model.encoder.register_forward_hook(lambda _, __, out: seen.append(out))
    tokens, mask, types = map(torch.from_numpy, (TOKENS, MASK, TYPES))
    with torch.no_grad():
        mlm, sop = model(tokens, mask, types if args.bert_binary_head else None)
        mlm = tensor_parallel.gather_from_tensor_model_parallel_region(mlm)
        if args.sequence_parallel:
            seen[0] = tensor_parallel.gather_from_sequence_parallel_region(seen[0])
    outputs = {"mlm": mlm.numpy(), "hidden": seen[0].transpose(0, 1).numpy()}
    if sop is not None:
        outputs["sop"] = sop.numpy()
    if torch.distributed.get_rank() == 0:
        np.savez(output, **outputs)
