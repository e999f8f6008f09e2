"""Write a checkpoint of Megatron as a folder that Hugging Face's transformers loads.

    python tools/checkpoint/export_hf.py --load RUN/checkpoints --output FOLDER \\
        --tokenizer TOKENIZER_FOLDER

GPT-2's architecture (learned positions, LayerNorm, GELU, biases) becomes a GPT2LMHeadModel. Llama's
(RoPE, RMSNorm, SwiGLU, no biases, with or without GQA) becomes a LlamaForCausalLM. Embeddings may
be tied or not. A HybridModel of the pattern *-*-... counts as a GPTModel of half as many layers. A
BertModel becomes a MegatronBertForPreTraining, or a MegatronBertForMaskedLM if it was trained with
--bert-no-binary-head. What finetune_vit trained becomes a ViTForImageClassification. Anything else
is refused. The checkpoint says everything about the model; you may have trained it on any parallel
layout. The tool is one process and needs no GPU. It takes about twice the memory of the model, in
the stored dtype, and does not read the optimizer.

A checkpoint of random-LTD is an ordinary one: evaluation drops nothing.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# This checkout's package, installed or not, and what makes its data.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

DTYPES = ("float32", "bfloat16", "float16")
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "bert": "MegatronBertForPreTraining",
    "bert_mlm": "MegatronBertForMaskedLM",
    "vit": "ViTForImageClassification",
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="FOLDER", help="the run's --save")
    add("--iteration", type=int, metavar="N", help="export this checkpoint (the latest)")
    add("--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    text = "a folder that save_pretrained wrote, or a tokenizer.json (the run's, if still there)"
    add("--tokenizer", type=Path, metavar="FOLDER", help=text)
    add("--vocab-file", type=Path, metavar="FILE", help="GPT-2's vocab.json (or --tokenizer)")
    add("--merge-file", type=Path, metavar="FILE", help="GPT-2's merges.txt")
    text = "number of tokens without padding, if you have no tokenizer"
    add("--vocab-size", type=int, metavar="N", help=text)
    add("--dtype", choices=DTYPES, help="dtype of the written weights (as stored)")
    options = parser.parse_args(argv)
    if bool(options.vocab_file) != bool(options.merge_file):
        parser.error("--vocab-file and --merge-file go together")
    if options.tokenizer and options.vocab_file:
        parser.error("give --tokenizer or --vocab-file with --merge-file, not both")
    for name in ("tokenizer", "vocab_file", "merge_file"):
        path = getattr(options, name)
        if path and not path.exists():
            parser.error(f"--{name.replace('_', '-')}: there is no {path}")
    if options.output.exists():
        parser.error(f"--output {options.output} exists; name a new folder")
    return options


def converted(options: argparse.Namespace, scratch: Path) -> tuple[Any, dict[str, Any], list[str]]:
    """Return the model's configuration, its parameters by name, and what to say of them.

    Args:
        scratch: An empty folder, to write the tokenizer to.

    Raises:
        ConversionError: The checkpoint cannot be exported.
    """
    import hf_checkpoint
    import hf_config
    import hf_names
    import hf_weights
    import torch

    folder = hf_checkpoint.find(options.load, options.iteration)
    args = hf_config.as_gpt(hf_checkpoint.stored_args(folder))
    shapes = hf_checkpoint.tensor_shapes(folder)
    family = hf_names.family_of(shapes) or hf_config.family_of(args)
    check_args(family, args)
    hf_weights.check_names(family, hf_config.shape_of(args, 0), shapes)
    config, more = config_of(family, args, shapes, options, scratch)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    weights = {
        name: tensor.contiguous()
        for name, tensor in hf_weights.to_hugging_face(
            family,
            hf_config.shape_of(args, getattr(config, "vocab_size", 0)),
            lambda name: hf_checkpoint.read(folder, name),
            dtype,
        )
    }
    config.dtype = weights[next(iter(weights))].dtype
    config.architectures = [ARCHITECTURES[family]]
    parameters = sum(tensor.numel() for tensor in weights.values())
    if family == "bert_mlm":
        import hf_bert

        weights |= [hf_bert.without_types(config, weights[next(iter(weights))])]
    title = hf_names.FAMILIES[family].title
    kind = f"{title}, {parameters:,} parameters in {str(config.dtype)[6:]}"
    return config, weights, [f"{kind}, from {folder}", *more]


def check_args(family: str, args: Any) -> None:
    """Check that the family's model in transformers computes what Megatron's arguments say.

    Raises:
        ConversionError: It does not. (`hf_config.family_of` has checked a GPT.)
    """
    import hf_bert
    import hf_vit

    if family in ("bert", "bert_mlm"):
        hf_bert.check_args(args)
    elif family == "vit":
        hf_vit.check_args(args)


def config_of(
    family: str, args: Any, shapes: dict[str, Any], options: argparse.Namespace, scratch: Path
) -> tuple[Any, list[str]]:
    """Write what goes with a model, its tokenizer or how to prepare images.

    Returns:
        The model's configuration, and what to say of it.

    Raises:
        ConversionError: The tokenizer is not the model's, or not known.
    """
    import hf_bert
    import hf_config
    import hf_tokenizer
    import hf_vit

    if family == "vit":
        config = hf_vit.config_of(args)
        text = json.dumps(hf_vit.preprocessor_of(args), indent=2) + "\n"
        (scratch / "preprocessor_config.json").write_text(text)
        height, width = hf_vit.image_of(config)
        images = f"images: {height} x {width} in patches of {config.patch_size}"
        return config, [f"{images}, {config.num_labels:,} classes, without their names"]
    tokenizer = hf_tokenizer.write(
        scratch, args, options.tokenizer, options.vocab_file, options.merge_file
    )
    rows = shapes["embedding.word_embeddings.weight"][0]
    vocabulary = hf_tokenizer.vocabulary(args, tokenizer, options.vocab_size, rows)
    said = [f"vocabulary: {vocabulary:,} tokens, {rows - vocabulary:,} rows of padding cut off"]
    if family in ("bert", "bert_mlm"):
        config = hf_bert.config_of(args, vocabulary, getattr(tokenizer, "pad_token_id", None))
        said += hf_bert.notes(family, config)
    else:
        ends = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")}
        config = hf_config.config_of(family, args, vocabulary, ends)
    if family == "gpt2":
        said.append(f"activation: {config.activation_function}, as the run computed it")
    if tokenizer is None:
        said.append("no tokenizer: evaluation needs one, see --tokenizer")
    elif tokenizer.eos_token is None and family in ("gpt2", "llama"):
        said.append("the tokenizer names no end-of-text token (eos_token), as evaluation needs")
    return config, said


def save(config: Any, weights: dict[str, Any], folder: Path) -> None:
    """Let transformers write the model, every parameter of which must be there and no other."""
    import hf_vit
    import torch
    import transformers
    from hf_names import TIED
    from transformers.utils import logging

    logging.disable_progress_bar()
    if config.model_type == hf_vit.MODEL_TYPE:
        hf_vit.save(config, weights, folder)
    else:
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
        assert not unexpected and set(missing) <= set(TIED), (missing, unexpected)
        weights.clear()
        model.tie_weights()
        model.save_pretrained(folder)
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    if "rope_parameters" in stored:  # transformers 4 reads it from here, or takes its own default
        stored["rope_theta"] = stored["rope_parameters"]["rope_theta"]
    stored["torch_dtype"] = stored["dtype"]
    path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Export; return the exit status."""
    options = parse_args(argv)
    import hf_checkpoint
    import hf_config
    from hf_weights import ConversionError

    try:
        hf_config.require_transformers()
        with hf_checkpoint.new_folder(options.output) as scratch:
            with hf_checkpoint.alone():
                config, weights, said = converted(options, scratch)
            # Not in there: what torch.device("meta") first sees of torch, it sees ever after.
            save(config, weights, scratch)
    except (ConversionError, OSError) as error:
        print(f"export_hf: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {said[0]}", *said[1:], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
