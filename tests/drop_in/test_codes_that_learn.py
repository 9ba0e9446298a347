"""What people do with a model whose packed codes learn: train, save, copy, resize, wrap, and share it out."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import peft
import pytest
import torch
import transformers
from families import FAMILIES
from learning import AUTO, LAYOUT, codec_tensors, learn, logits, optimiser, rich_model, table
from packed import CLASSES, NUM_ROWS, PACKED_LAYOUT, convert_input
from test_training import LEARNING, in_two_processes, trainer
from tiny import Sentences, make, outputs

from hf_dirembed.remote.guarded_dirembed import plain
from hf_dirembed.remote.kernels_dirembed import count_classes, row_classes


pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied"])
def test_trainer(name: str, tmp_path: Path) -> None:
    """The loss falls, the best checkpoint is loaded, and a run goes on from the codes of a checkpoint."""
    model = rich_model(name).unfreeze_codes()
    run = trainer(model, tmp_path, Sentences())
    first = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < first
    loaded = transformers.AutoModelForCausalLM.from_pretrained(run.state.best_model_checkpoint).state_dict()
    trained = model.state_dict()
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in trained.items())
    again = rich_model(name).unfreeze_codes()
    resumed = trainer(again, tmp_path, Sentences())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.evaluate()["eval_loss"] < first


def test_loading_derives_the_floats_anew() -> None:
    model, other = rich_model().unfreeze_codes(), rich_model().unfreeze_codes()
    learn(model, steps=3)
    floats = other.get_input_embeddings().shadow.weight
    other.load_state_dict(model.state_dict())
    assert other.get_input_embeddings().shadow.weight is floats  # an optimiser may have it by now
    assert torch.equal(logits(other.eval()), logits(model))
    embedding = other.get_input_embeddings()
    first = (embedding.row_classes() == 0).nonzero().squeeze(1)
    codes = plain(embedding.latents_weight)[: CLASSES[0].num_codes].long()
    summed = torch.zeros(len(first), PACKED_LAYOUT.rank).index_add(1, codes, floats.detach())
    torch.testing.assert_close(summed, embedding.latents_of(first).detach())


def test_copies_learn_on_by_themselves() -> None:
    model = rich_model().unfreeze_codes()
    learn(model, steps=2)
    expected, codes = logits(model), table(model)["weight"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.get_input_embeddings().shadow is twin.get_output_embeddings().shadow
        assert torch.equal(logits(twin), expected)
        learn(twin, steps=2)
        assert not torch.equal(twin.get_input_embeddings().weight, codes)
    assert torch.equal(model.get_input_embeddings().weight, codes)


def test_codes_learn_where_a_resize_left_no_row_of_a_class() -> None:
    tensors = codec_tensors()
    of_classes = row_classes(tensors["row_weight"]).argsort()
    tensors["row_weight"] = tensors["row_weight"][of_classes]
    tensors["class_counts_weight"] = count_classes(tensors["row_weight"], len(CLASSES))
    model = convert_input(FAMILIES["llama-tied"].make(AUTO), LAYOUT, tensors).unfreeze_codes()
    embedding = model.get_input_embeddings()
    assert {name for name, _ in embedding.shadow.named_parameters()} == {"weight", "weight_1", "weight_2"}
    model.resize_token_embeddings(NUM_ROWS - CLASSES[2].rows)
    assert {name for name, _ in embedding.shadow.named_parameters()} == {"weight", "weight_1"}
    ids, before = Sentences().ids[:8].clamp(max=embedding.num_embeddings - 1), embedding.code_tensors()
    before = {name: tensor.clone() for name, tensor in before.items()}
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser(model, lr=0.1).step()
    assert embedding.dense_weight().isfinite().all()
    for name in ("weight", "further_weight"):
        assert not torch.equal(getattr(embedding, name), before[name])


def test_new_tokens_while_codes_learn(tmp_path: Path) -> None:
    model = rich_model().unfreeze_codes()
    learn(model, steps=2)
    optimiser(model).step()  # not in the codes yet
    for size in (NUM_ROWS + 5, NUM_ROWS - 20):
        model.resize_token_embeddings(size)
        embedding = model.get_input_embeddings()
        counts = embedding.row_classes().bincount().tolist()
        shapes = [(rows, each.num_codes) for rows, each in zip(counts, CLASSES, strict=True)]
        assert [parameter.shape for parameter in embedding.shadow.parameters()] == shapes
        assert embedding.shadow.weight.requires_grad
        assert embedding.outlier_weight.requires_grad
    before = embedding.weight.clone()
    ids = Sentences().ids[:8].clamp(max=size - 1)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimiser(model, lr=0.1).step()
    model.save_pretrained(tmp_path)
    assert not torch.equal(embedding.weight, before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["bert", "t5", "bart", "gemma3"])
def test_families(name: str, tmp_path: Path) -> None:
    """Tables that an encoder and a decoder share, that are scaled, and heads with a bias."""
    auto = {"bert": "AutoModelForMaskedLM", "gemma3": AUTO}.get(name, "AutoModelForSeq2SeqLM")
    model, inputs = make(name, auto).train().unfreeze_codes(), FAMILIES[name].inputs()
    labels = inputs.get("decoder_input_ids", inputs["input_ids"])
    adam, codes, losses = optimiser(model, lr=0.03), table(model)["weight"], []
    for _ in range(4):
        losses.append(model(**inputs, labels=labels).loss)
        losses[-1].backward()
        adam.step()
        adam.zero_grad()
    assert losses[-1] < losses[0]
    expected = outputs(model.eval(), name)[0]
    assert not torch.equal(model.get_input_embeddings().weight, codes)
    model.save_pretrained(tmp_path)
    again = getattr(transformers, auto).from_pretrained(tmp_path)
    assert torch.equal(outputs(again, name)[0], expected)


def test_beside_adapters_of_the_body(tmp_path: Path) -> None:
    """PEFT freezes what it wraps; unfrozen after that, codes learn with the adapter, and are in what is merged."""
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(rich_model(), config)
    adapted.unfreeze_codes()
    codes = table(adapted)["weight"]
    assert learn(adapted, steps=5) < learn(rich_model(), steps=0)
    assert not torch.equal(table(adapted)["weight"], codes)
    expected, merged = logits(adapted), adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


PROCESS = f"""{LEARNING}
for source, target in (sys.argv[1:3], sys.argv[3:5]):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source).unfreeze_codes().train()
    codes = model.get_input_embeddings().weight.clone()
    model, batch = learn(model)
    state = accelerator.get_state_dict(model)
    inner = accelerator.unwrap_model(model).eval()
    embedding = inner.get_input_embeddings()
    assert not torch.equal(embedding.weight, codes)
    for tensor in (embedding.weight, embedding.shadow.weight):
        assert (accelerator.gather(tensor.detach()[None].contiguous()) == tensor).all()
    accelerator.save_state(target + "-state")
    accelerator.wait_for_everyone()
    accelerator.load_state(target + "-state")
    if accelerator.is_main_process:
        inner.save_pretrained(target, state_dict=state)
        again = AutoModelForCausalLM.from_pretrained(target).eval()
        assert torch.equal(again(batch).logits, inner(batch).logits)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
accelerator.end_training()
"""


def test_two_processes(tmp_path: Path) -> None:
    folders = []
    for name in ("llama-tied", "llama-untied"):
        folders += [tmp_path / name, tmp_path / f"{name}-trained"]
        rich_model(name).save_pretrained(folders[-2])
    in_two_processes(PROCESS, *folders)


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
import hf_dirembed

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for unfreeze_first in (True, False):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    steps = [lambda: model.unfreeze_codes(), lambda: fully_shard(model, mesh=mesh)]
    first, second = steps if unfreeze_first else reversed(steps)
    first()
    try:
        second()
    except hf_dirembed.ModelError as error:
        assert "before fully_shard" in str(error), error
    else:
        raise AssertionError("not refused")
dist.barrier()
dist.destroy_process_group()
"""


def test_sharded_codes_are_refused(tmp_path: Path) -> None:
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("this torch does not have it yet")
    rich_model().save_pretrained(tmp_path)
    in_two_processes(SHARDED, tmp_path)
