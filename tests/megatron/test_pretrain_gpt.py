"""The bundled GPT script: the model that it builds itself where Megatron does not."""

import types

import pytest

from megatron_rltd.config import ConfigError
from tests.megatron.test_training import BASE, LTD, assert_same
from tests.parallel import train

# On Megatron 0.19 pretrain with the model of older releases; on those it is the only one.
SCRIPT = """
from megatron_rltd.pretrain import pretrain_gpt
from megatron_rltd.pretrain.model_provider import model_provider

original = pretrain_gpt.pretrain


def pretrain(config, *rest):
    config.model = None
    original(config, *rest, model_provider=model_provider)


if pretrain_gpt.RELEASE >= (0, 19):
    pretrain_gpt.pretrain = pretrain
pretrain_gpt.main()
"""
SPEC = """
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp

SPEC = get_gpt_layer_local_spec()
SPEC.submodules.input_layernorm = IdentityOp
"""
MODELS = {
    "dense": "--rotary-percent 0.5 --rotary-seq-len-interpolation-factor 2",
    "experts": "--num-experts 4 --moe-router-topk 2 --moe-layer-freq [1,0,0,1] --qk-layernorm "
    "--normalization RMSNorm --swiglu --untie-embeddings-and-output-weights",
    "multi-token prediction": "--mtp-num-layers 1",
    "a spec": "--spec layer_spec SPEC",
}


@pytest.mark.thorough
@pytest.mark.parametrize("model", MODELS)
def test_the_model_of_older_releases_is_megatrons(tmp_path, model):
    (tmp_path / "layer_spec.py").write_text(SPEC)
    ours, megatrons = tmp_path / "ours.py", tmp_path / "megatrons.py"
    ours.write_text(SCRIPT)
    megatrons.write_text("from megatron_rltd.pretrain.pretrain_gpt import main\n\nmain()\n")
    line = f"{BASE} {LTD} {MODELS[model]}"
    assert_same(train(line, script=str(ours)), train(line, script=str(megatrons)))


def test_models_that_it_cannot_build_are_an_error(monkeypatch):
    from megatron_rltd.pretrain import model_provider

    for flag in model_provider.OTHER_MODELS:
        args = types.SimpleNamespace(**{flag[2:].replace("-", "_"): "given"})
        monkeypatch.setattr(model_provider, "get_args", lambda args=args: args)
        with pytest.raises(ConfigError, match=f"{flag} does not work with this script: use"):
            model_provider.model_provider()


def write(prefix, documents, length):
    """Write documents of 0, 1, 2, ... where Megatron reads them; return their prefix."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    for _ in range(documents):
        builder.add_document(torch.arange(length), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_several_validation_sets_are_evaluated_whole(tmp_path):
    names = [write(tmp_path / name, n, 100) for name, n in (("a", 90), ("b", 20), ("c", 40))]
    line = BASE.replace("--mock-data", "").replace("--split 90,5,5", "")
    line += " --train-data-path {} --valid-data-path {} {}".format(*names)
    several = train(f"{line} --multiple-validation-sets --full-validation")
    for number in (0, 1):
        assert f"validation-{number} loss at iteration" in several.output


@pytest.mark.parametrize(
    ("documents", "split", "missing"),
    [
        (10, "90,10,0", []),
        (10, "969, 30, 1", ["validation", "test"]),
        (1, "100,0,0", []),
        (1, "50,50", ["training"]),
        (2000, "969, 30, 1", []),
    ],
)
def test_sets_without_a_document_are_named(tmp_path, documents, split, missing):
    # Megatron would search them for samples forever.
    from megatron_rltd.pretrain.pretrain_gpt import empty_sets

    prefix = write(tmp_path / "data", documents, 3)
    problems = empty_sets(split, prefix)
    assert len(problems) == len(missing)
    for problem, name in zip(problems, missing, strict=True):
        assert f"--split {split} gives {name} none of the {documents} documents" in problem
        assert "use a larger share, or 0" in problem
