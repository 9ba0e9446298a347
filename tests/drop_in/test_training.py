"""Fine-tuning: Trainer with checkpoints and exact resumption, two processes, and what of the table learns."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES
from tiny import BUDGETS, Sentences, make, outputs
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

import hf_dirembed


AUTOS = {"bert": "AutoModelForMaskedLM", "llama-tied": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}
# Its newer name is not in the oldest transformers that is supported.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
CASES = [(name, method) for name in AUTOS for method in BUDGETS]


def trainer(model: PreTrainedModel, folder: Path, data: Sentences) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        load_best_model_at_end=True,
        gradient_checkpointing=True,
        disable_tqdm=True,
        report_to=[],
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data)


def table(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.get_input_embeddings().code_tensors().items()}


@pytest.mark.parametrize(("name", "method"), CASES, ids=["-".join(case) for case in CASES])
def test_trainer(name: str, method: str, tmp_path: Path) -> None:
    """The loss falls, codes stay, a run that is taken up from its checkpoint ends where the other did."""
    model = make(name, AUTOS[name], method)
    before = table(model)
    whole = trainer(model, tmp_path, Sentences())
    first = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < first
    assert whole.state.best_model_checkpoint is not None
    for key, tensor in table(model).items():
        assert torch.equal(tensor, before[key]) == (not key.startswith("decoder")), key
    again = make(name, AUTOS[name], method)
    trainer(again, tmp_path, Sentences()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    loaded = getattr(transformers, AUTOS[name]).from_pretrained(tmp_path / "checkpoint-8")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


def test_float_latents_learn_when_they_are_asked_to(tmp_path: Path) -> None:
    """Rows that no example names have no gradient: in float16, Adam would make NaNs of them."""
    model = make("llama-untied", "AutoModelForCausalLM", "direction")
    embedding = model.get_input_embeddings()
    before = table(model)
    assert not embedding.weight.requires_grad
    embedding.unfreeze_codes()
    run = trainer(model, tmp_path, torch.utils.data.Subset(Sentences(), range(8)))
    first = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < first
    seen = torch.zeros(len(embedding.weight), dtype=torch.bool).index_fill(0, Sentences().ids[:8].unique(), True)
    changed = (embedding.weight != before["weight"]).any(dim=1)
    assert changed[seen].any()
    assert embedding.weight.dtype == torch.float32
    assert embedding.weight.isfinite().all()
    model.save_pretrained(tmp_path / "trained")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert torch.equal(again.get_input_embeddings().weight, embedding.weight)
    assert not again.get_input_embeddings().weight.requires_grad
    assert embedding.freeze_codes().weight.dtype == torch.float16


@pytest.mark.parametrize("name", ["bert", "llama-tied"])
def test_unfrozen_latents_stay_tied(name: str, tmp_path: Path) -> None:
    model = make(name, AUTOS[name], "direction")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.unfreeze_codes()
    assert head.weight is embedding.weight
    assert embedding.weight in set(model.requires_grad_().parameters())
    assert embedding.weight.requires_grad
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before, labels = embedding.weight.detach().clone(), FAMILIES[name].inputs()["input_ids"]
    model(input_ids=labels, labels=labels).loss.backward()
    optimizer.step()
    assert not torch.equal(embedding.weight, before)
    assert head.weight is embedding.weight
    model.requires_grad_(False).requires_grad_(True)
    assert not embedding.weight.requires_grad
    assert embedding.decoder_weight.requires_grad


def test_expand_train_and_compress_again(tmp_path: Path) -> None:
    model = hf_dirembed.expand(make("llama-tied", "AutoModelForCausalLM"))
    trainer(model, tmp_path, Sentences()).train()
    again = hf_dirembed.compress(model, **BUDGETS["transform"])
    again.save_pretrained(tmp_path / "again")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(loaded, "llama-tied")[0], outputs(again.eval(), "llama-tied")[0])


LEARNING = """
import sys
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
import hf_dirembed

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2

def learn(model):
    loader = torch.utils.data.DataLoader(torch.randint(8, 160, (32, 9)), batch_size=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for epoch in range(3):
        for batch in loader:
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    return model, batch
"""


PROCESS = f"""{LEARNING}
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
codes = model.get_input_embeddings().weight.clone()
model, batch = learn(model)
inner = accelerator.unwrap_model(model)
decoder = inner.get_input_embeddings().decoder_weight.detach()
assert (accelerator.gather(decoder[None]) == decoder).all()
assert torch.equal(inner.get_input_embeddings().weight, codes)
accelerator.save_state(sys.argv[2])
accelerator.wait_for_everyone()
accelerator.load_state(sys.argv[2])
if accelerator.is_main_process:
    inner.save_pretrained(sys.argv[3])
    again = AutoModelForCausalLM.from_pretrained(sys.argv[3])
    assert torch.equal(again.eval()(batch).logits, inner.eval()(batch).logits)
accelerator.end_training()
"""


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
import hf_dirembed

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for source, target in (sys.argv[1:3], sys.argv[3:5]):
    model, whole = (AutoModelForCausalLM.from_pretrained(source) for _ in range(2))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    if dist.get_rank() == 0:
        assert "CompressedEmbedding" in repr(model)  # which waits for nobody
    batches = torch.randint(8, 160, (2, 4, 9), generator=torch.Generator().manual_seed(0))
    ids = batches[dist.get_rank()]
    learning = ([p for p in each.parameters() if p.requires_grad] for each in (model, whole))
    optimizers = [torch.optim.SGD(parameters, lr=0.5) for parameters in learning]
    losses = []
    for _ in range(3):
        (loss := model(input_ids=ids, labels=ids).loss).backward()
        whole(input_ids=batches.flatten(0, 1), labels=batches.flatten(0, 1)).loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0], losses
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        codes = whole.get_input_embeddings().weight
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(state["model.embed_tokens.weight"], codes)
        model.save_pretrained(target, state_dict=state)  # by one of them, as Trainer does
        again = AutoModelForCausalLM.from_pretrained(target).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
        assert again.keys() == whole.state_dict().keys()
dist.barrier()
dist.destroy_process_group()
"""


def in_two_processes(code: str, *arguments: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        ranks.append(subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def test_two_processes(tmp_path: Path) -> None:
    make("llama-tied", "AutoModelForCausalLM").save_pretrained(tmp_path / "model")
    in_two_processes(PROCESS, *(tmp_path / name for name in ("model", "state", "trained")))


def test_two_processes_that_share_the_model(tmp_path: Path) -> None:
    """FSDP, as torch has it: what is sharded trains as the whole does, and one process saves it."""
    if not hasattr(torch.distributed.fsdp, "fully_shard"):
        pytest.skip("this torch does not have it yet")
    for method in BUDGETS:
        make("llama-tied", "AutoModelForCausalLM", method).save_pretrained(tmp_path / method)
    folders = ((tmp_path / method, tmp_path / f"{method}-trained") for method in BUDGETS)
    in_two_processes(SHARDED, *(folder for pair in folders for folder in pair))
