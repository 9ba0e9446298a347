"""PEFT over a compressed model: adapters train, save, reload and merge; what it cannot do ends in an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES
from test_fresh_process import WITHOUT_PLUGIN, run
from tiny import BUDGETS, make
from torch import Tensor
from transformers import PreTrainedModel

import hf_dirembed
from hf_dirembed import CompressedEmbedding, CompressedLinear, ModelError


peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
AUTO = "AutoModelForCausalLM"
IDS = FAMILIES["llama-tied"].inputs()["input_ids"]
ADAPTERS = {
    "lora": (peft.LoraConfig, {"target_modules": ["q_proj", "v_proj"]}),
    "all-linear": (peft.LoraConfig, {"target_modules": "all-linear"}),
    "dora": (peft.LoraConfig, {"target_modules": ["q_proj"], "use_dora": True}),
    "a norm": (peft.LoraConfig, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "ia3": (peft.IA3Config, {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "prompt": (peft.PromptTuningConfig, {"num_virtual_tokens": 3}),
}


def adapt(model: PreTrainedModel, adapter: str) -> peft.PeftModel:
    kind, options = ADAPTERS[adapter]
    return peft.get_peft_model(model, kind(**options, task_type="CAUSAL_LM"))


def train(model: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("name", "method"), [("llama-tied", "transform"), ("llama-untied", "direction")])
def test_adapters_of_the_body(name: str, method: str, adapter: str, tmp_path: Path) -> None:
    model = make(name, AUTO, method)
    before = logits(model)
    table = {key: tensor.clone() for key, tensor in model.get_input_embeddings().code_tensors().items()}
    adapted = adapt(model, adapter)
    train(adapted)
    expected = logits(adapted)
    assert not torch.equal(expected, before)
    adapted.save_pretrained(tmp_path / "adapter")
    make(name, AUTO, method).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), expected)
    if adapter == "prompt":
        return
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, table[key]) for key, tensor in merged.get_input_embeddings().code_tensors().items())
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(merged))
    torch.testing.assert_close(logits(hf_dirembed.expand(again)), expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_is_saved_whole(tmp_path: Path) -> None:
    auto, ids = "AutoModelForSequenceClassification", FAMILIES["bert"].inputs()["input_ids"]
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(make("bert", auto), config)
    adapted(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make("bert", auto), tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, adapted.eval()(input_ids=ids).logits)


def test_lora_on_the_decoder_is_lora_on_the_table(tmp_path: Path) -> None:
    """The table is Z D: an adapter of low rank on D is one on the table, and merges."""
    model = make("llama-untied", AUTO)
    config = peft.LoraConfig(target_parameters=["embed_tokens.decoder_weight"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    train(adapted)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(make("llama-untied", AUTO), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), expected)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Unsupported layer type")
@pytest.mark.parametrize("method", BUDGETS)
def test_what_wants_a_dense_table_is_refused(method: str) -> None:
    """Before anything is trained: LoRA on the table by PEFT, which names the module, the rest by us."""
    for target, module in (("embed_tokens", CompressedEmbedding), ("lm_head", CompressedLinear)):
        config = peft.LoraConfig(target_modules=[target], task_type="CAUSAL_LM")
        with pytest.raises(ValueError, match=rf"Target module {module.__name__}\(.* is not supported"):
            peft.get_peft_model(make("llama-tied", AUTO, method), config)
    for config in (
        peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
        peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5], task_type="CAUSAL_LM"),
    ):
        with pytest.raises(ModelError, match="dense table, and a CompressedEmbedding has none: expand the model"):
            peft.get_peft_model(make("llama-tied", AUTO, method), config)
    dense = hf_dirembed.expand(make("llama-tied", AUTO, method))
    train(peft.get_peft_model(dense, config))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
def test_packed_codes_are_not_saved_whole(name: str) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match="leave the CompressedEmbedding out of it, or compress with method='direc"):
        peft.get_peft_model(make(name, AUTO), config)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("method", BUDGETS)
def test_lora_on_a_shared_decoder_is_refused(method: str, tmp_path: Path) -> None:
    """Of the two modules that share it, an adapter changes one until it is merged, and then both."""
    model = make("llama-tied", AUTO, method)
    model.save_pretrained(tmp_path)
    for compressed in (model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        for module in ("embed_tokens", "lm_head"):
            config = peft.LoraConfig(target_parameters=[f"{module}.decoder_weight"], task_type="CAUSAL_LM")
            with pytest.raises(ModelError, match=r"decoder_weight of this Compressed.* is shared with a tied module"):
                peft.get_peft_model(compressed, config)


def test_without_the_plugin_it_is_refused_too(tmp_path: Path) -> None:
    """By the code in the repo."""
    make("llama-tied", AUTO).save_pretrained(tmp_path / "model")
    code = """
import sys, peft, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
config = peft.LoraConfig(target_parameters=["lm_head.decoder_weight"], task_type="CAUSAL_LM")
try:
    peft.get_peft_model(model, config)
except ValueError as error:
    print(type(error).__module__.partition(".")[0], error)
"""
    said = run(WITHOUT_PLUGIN + code, tmp_path / "model", modules=tmp_path)
    assert said.startswith("transformers_modules decoder_weight of this CompressedLinear is shared with a tied module")


def test_lora_on_packed_codes_is_refused() -> None:
    config = peft.LoraConfig(target_parameters=["embed_tokens.weight"], task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match="weight holds packed integers, which no adapter adds to"):
        peft.get_peft_model(make("llama-untied", AUTO), config)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("method", BUDGETS)
@pytest.mark.parametrize("unfrozen", [False, True])
def test_tying_what_is_saved_whole_is_refused_when_it_wraps(unfrozen: bool, method: str, modules: list[str]) -> None:
    """PEFT makes a dense head of the other's weight then, which holds codes."""
    model = make("llama-tied", AUTO, method)
    if unfrozen:
        model.unfreeze_codes()
    config = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=modules, ensure_weight_tying=True, task_type="CAUSAL_LM"
    )
    with pytest.raises(ModelError, match=r"hf_dirembed\.expand|unfreeze_codes"):
        peft.get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model = make("llama-tied", AUTO)
    before, modules = logits(model), [type(module) for module in model.modules()]
    config = peft.TrainableTokensConfig(token_indices=[3], target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    with pytest.raises(ModelError):
        peft.get_peft_model(model, config)
    assert [type(module) for module in model.modules()] == modules
    assert torch.equal(logits(model), before)


def test_float_latents_are_saved_whole_once_they_are_unfrozen(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    with pytest.raises(ModelError, match="call unfreeze_codes"):
        peft.get_peft_model(make("llama-untied", AUTO, "direction"), config)

    def unfrozen() -> PreTrainedModel:
        model = make("llama-untied", AUTO, "direction")
        model.get_input_embeddings().unfreeze_codes()
        return model

    adapted = peft.get_peft_model(unfrozen(), config)
    train(adapted)
    expected = logits(adapted)
    assert expected.isfinite().all()
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(unfrozen(), tmp_path / "adapter").eval()), expected)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))


@pytest.mark.filterwarnings("ignore:.*tie")
def test_a_head_that_came_untied_is_saved_by_itself_and_expands(tmp_path: Path) -> None:
    """PEFT unties what it trains one of two of: from then on there are two tables."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    model = make("llama-tied", AUTO, "direction")
    model.get_input_embeddings().unfreeze_codes()
    adapted = peft.get_peft_model(model, config)
    train(adapted)
    merged = adapted.merge_and_unload()
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)
    expected = logits(merged)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert set(again.config.dirembed["tables"]) == {"model.embed_tokens", "lm_head"}
    assert torch.equal(logits(again), expected)
    merged.config.tie_word_embeddings = True  # which they are not: a file would have one of them for both
    with pytest.raises(ModelError, match=r"lm_head and model.embed_tokens are tied, but have codes of their own"):
        merged.save_pretrained(tmp_path / "tied")
    assert not (tmp_path / "tied").exists()
    merged.config.tie_word_embeddings = False
    dense = hf_dirembed.expand(merged)
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(dense))
