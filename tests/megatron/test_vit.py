"""random-LTD on megatron-core's ViT, against plain loops over samples, in float64."""

import copy

import pytest
import torch

from megatron_rltd import ConfigError, RandomLTD, RandomLTDConfig, kept_indices
from tests import gpt

SEED, CONSUMED, BATCH = 7, 1000, 3
SIZES = {17: (8, 2), 197: (224, 16)}  # tokens: pixels of a side, and of a patch


@pytest.fixture(scope="module", autouse=True)
def megatron():
    with gpt.one_process():
        yield


def build(tokens=17, num_layers=4, **options):
    """Return a classifier of 5 classes in float64 with random weights, in training mode."""
    from megatron_rltd.vision.classifier import ViTClassifier, layer_spec

    side, patch = SIZES[tokens]
    config = gpt.config(num_layers=num_layers, **options)
    model = ViTClassifier(config, layer_spec(False), 5, side, side, patch).double()
    return gpt.with_random_weights(model)


def images(tokens=17):
    side = SIZES[tokens][0]
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, 3, side, side, generator=generator, dtype=torch.float64)


def attached(model, kept, **options):
    config = RandomLTDConfig(min_tokens=kept, constant=True, increment=1, seed=SEED, **options)
    return RandomLTD(config).attach(model)


def plain_logits(model, pixels, kept):
    """Return the logits with each layer run sample by sample.

    Args:
        kept: Layer number to kept positions, [b, k].
    """
    patches = model.conv1(pixels).flatten(2).transpose(1, 2)
    class_token = model.class_token.expand(len(pixels), -1, -1)
    hidden = torch.cat([class_token, patches], dim=1) + model.position_embeddings.weight
    samples = []
    for j in range(len(pixels)):
        rows = hidden[j].unsqueeze(1)
        for layer in model.decoder.layers:
            indices = kept.get(layer.layer_number)
            index = torch.arange(len(rows)) if indices is None else indices[j].long()
            out, _ = type(layer).forward(layer, hidden_states=rows[index], attention_mask=None)
            rows = rows.index_copy(0, index, out)
        samples.append(rows[0, 0])
    return model.head(model.final_layernorm(torch.stack(samples)))


def gradients(model, logits):
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits, torch.arange(BATCH)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("tokens", "kept", "recompute"), [(17, 5, None), (17, 5, "full"), (197, 66, None)]
)
def test_equals_plain_loops(tokens, kept, recompute):
    options = {"recompute_granularity": recompute}
    if recompute:
        options |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    model, pixels = build(tokens, **options), images(tokens)
    samples = CONSUMED + torch.arange(BATCH)
    drawn = kept_indices(SEED, torch.tensor([2, 3]), samples, tokens, kept, 1)
    indices = dict(zip([2, 3], drawn, strict=True))
    plain = plain_logits(model, pixels, indices)
    plain_gradients = gradients(model, plain)
    full = plain_logits(model, pixels, {})
    assert (plain - full).abs().max() > 1e-3
    # The class token is a token like others: some layer of some sample drops it.
    assert any(0 not in row for layer in indices.values() for row in layer.tolist())
    random_ltd = attached(model, kept)
    assert random_ltd.resolved.dropped_layers == (2, 3)
    random_ltd.begin_step(0, CONSUMED)
    random_ltd.begin_micro_batch(0)
    ours = model(pixels)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for name, value in gradients(model, ours).items():
        scale = plain_gradients[name].abs().max()
        assert scale > 0, name
        assert (value - plain_gradients[name]).abs().max() <= 1e-11 * scale, name
    random_ltd.end_step()
    torch.testing.assert_close(model(pixels), full, rtol=1e-12, atol=1e-12)


def test_a_tower_in_a_larger_model_never_drops():
    tower, language = build(), gpt.build()
    both = torch.nn.ModuleDict({"vision": tower, "language": language})
    random_ltd = attached(both, 5)
    assert "forward" not in vars(tower.decoder)
    assert "forward" in vars(language.decoder)
    random_ltd.detach()
    # A pipeline stage of a multimodal model that has only the tower.
    stage = torch.nn.Module()
    stage.vision_model, stage.language_model = tower, None
    with pytest.raises(RuntimeError, match="a vision tower never drops"):
        attached(stage, 5)
    attached(torch.nn.Sequential(tower), 5)  # a wrapper is no larger model
    assert "forward" in vars(tower.decoder)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}, "pipeline-model"),
        ({"context_parallel_size": 2}, "context"),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, "sequence"),
    ],
)
def test_layouts_that_megatrons_vit_does_not_have_are_refused(options, flag):
    model = build()
    config = copy.copy(model.decoder.config)
    for name, value in options.items():
        setattr(config, name, value)
    model.decoder.config = config
    with pytest.raises(ConfigError, match=f"--{flag}.*-parallel.* with a ViT.*: (use|omit) --"):
        attached(model, 5)


def test_checkpoints_are_those_of_transformer_engine():
    from megatron_rltd.cpu.transformer_engine import local_modules
    from megatron_rltd.vision.classifier import ViTClassifier, layer_spec

    ours = build()
    spec = local_modules(layer_spec(True))  # the same parameters and keys in plain torch
    theirs = ViTClassifier(ours.config, spec, 5, *SIZES[17][:1] * 2, SIZES[17][1]).double()
    metadata = {"dp_cp_group": torch.distributed.group.WORLD}
    states = [model.sharded_state_dict(metadata=metadata) for model in (ours, theirs)]
    keys = [{v.key for k, v in state.items() if "_extra_state" not in k} for state in states]
    assert keys[0] == keys[1]
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in keys[0]
    assert {"conv1.bias", "class_token", "final_layernorm.weight", "head.weight"} <= keys[0]
    ours.fresh_head = True
    assert not [k for k in ours.sharded_state_dict(metadata=metadata) if k.startswith("head.")]


def test_logits_are_those_of_hugging_face():
    transformers = pytest.importorskip("transformers")
    model = build(197, num_layers=2, layernorm_epsilon=1e-12).eval()
    theirs = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=5,
            attn_implementation="eager",
        )
    )
    theirs = theirs.double().eval()
    state = hugging_face_weights(model, heads=4)
    assert theirs.load_state_dict(state, strict=False).unexpected_keys == []
    assert set(theirs.state_dict()) == set(state)
    pixels = images(197)
    # transformers takes the softmax of the attention in float32.
    torch.testing.assert_close(model(pixels), theirs(pixels).logits, rtol=0, atol=1e-6)


def hugging_face_weights(model, heads):
    """Return the classifier's weights by the names of transformers' module."""
    ours, width = model.state_dict(), model.config.hidden_size
    found = {
        "vit.embeddings.cls_token": ours["class_token"],
        "vit.embeddings.position_embeddings": ours["position_embeddings.weight"][None],
    }
    names = {
        "conv1": "vit.embeddings.patch_embeddings.projection",
        "final_layernorm": "vit.layernorm",
        "head": "classifier",
    }
    for n in range(len(model.decoder.layers)):
        names |= {
            f"decoder.layers.{n}.input_layernorm": f"vit.layers.{n}.layernorm_before",
            f"decoder.layers.{n}.pre_mlp_layernorm": f"vit.layers.{n}.layernorm_after",
            f"decoder.layers.{n}.self_attention.linear_proj": f"vit.layers.{n}.attention.o_proj",
            f"decoder.layers.{n}.mlp.linear_fc1": f"vit.layers.{n}.mlp.fc1",
            f"decoder.layers.{n}.mlp.linear_fc2": f"vit.layers.{n}.mlp.fc2",
        }
    for kind in ("weight", "bias"):
        found |= {f"{theirs}.{kind}": ours[f"{name}.{kind}"] for name, theirs in names.items()}
        for n in range(len(model.decoder.layers)):
            packed = ours[f"decoder.layers.{n}.self_attention.linear_qkv.{kind}"]
            rows = packed.view(heads, 3, width // heads, -1).transpose(0, 1)
            for letter, part in zip("qkv", rows, strict=True):
                shape = (width, width) if kind == "weight" else (width,)
                found[f"vit.layers.{n}.attention.{letter}_proj.{kind}"] = part.reshape(shape)
    return found
