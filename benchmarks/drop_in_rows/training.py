"""Training: Trainer, two processes, and what of the table learns."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import transformers
from drop_in_subject import Subject, exact, row, same_codes
from safetensors.torch import save_file
from transformers import PreTrainedModel, Trainer, TrainingArguments

import hf_dirembed


@row("Trainer", "4 steps with gradient checkpointing, checkpoint at 2, resumed there, the best loaded at the end")
def trainer(subject: Subject) -> str:
    def make(model: PreTrainedModel) -> Trainer:
        options = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "use_cpu": True}
        options |= {"load_best_model_at_end": True, "gradient_checkpointing": True, "learning_rate": 1e-4}
        options |= {"per_device_train_batch_size": 3, "disable_tqdm": True, "report_to": []}
        arguments = TrainingArguments(output_dir=str(subject.work / "runs"), **options)
        made = Trainer(model, arguments, train_dataset=subject.examples(), eval_dataset=subject.examples())
        made.remove_callback(transformers.PrinterCallback)  # which prints among the rows
        return made

    first, second = subject.trainee(), subject.trainee()
    whole = make(first)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    after = whole.evaluate()["eval_loss"]
    assert after < before, f"loss {before:.3f} -> {after:.3f}"
    same_codes(first, subject)
    make(second).train(resume_from_checkpoint=str(subject.work / "runs" / "checkpoint-2"))
    assert whole.state.best_model_checkpoint is not None
    best = subject.trainee(Path(whole.state.best_model_checkpoint)).state_dict()  # not always the last
    resumed = second.state_dict()
    for key, tensor in first.state_dict().items():
        exact(resumed[key], tensor)
        exact(best[key], tensor)
    return f"loss {before:.3f} -> {after:.3f}; codes untouched; resumed and reloaded exact"


PROCESS = """
import sys
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import hf_dirembed

source, target, auto, batch, way = sys.argv[1:]
dist.init_process_group("gloo")
torch.manual_seed(0)
model = getattr(transformers, auto).from_pretrained(source)
codes = model.get_input_embeddings().weight.clone()
if way == "DDP":
    trained = torch.nn.parallel.DistributedDataParallel(model)
else:
    mesh = init_device_mesh("cpu", (2,))
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for part in (*(layer for layers in lists for layer in layers), model):
        fully_shard(part, mesh=mesh)
    trained = model
batch = {key: value.roll(dist.get_rank(), 0)[:2] for key, value in load_file(batch).items()}
optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)
losses = []
for _ in range(4):
    loss = trained(**batch).loss
    losses.append(loss.item())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[-1] < losses[0], losses
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    model.save_pretrained(target, state_dict=state)
    again = getattr(transformers, auto).from_pretrained(target)
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in state.items()), "reloads otherwise"
    assert torch.equal(again.get_input_embeddings().weight, codes), "the codes changed"
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
dist.barrier()
dist.destroy_process_group()
"""


def in_two_processes(way: str, subject: Subject) -> str:
    batch = subject.work / "batch.safetensors"
    save_file(torch.utils.data.default_collate(subject.examples()), batch)
    auto = "AutoModelForCausalLM" if subject.kind == "causal" else "AutoModelForSequenceClassification"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", PROCESS, str(subject.compressed), str(subject.work / way), auto, str(batch), way]
    processes = []
    for rank in range(2):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env={**os.environ, **environment}, text=True, **pipes))
    ends = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, ends, strict=True):
        assert process.returncode == 0, errors.strip().rsplit("\n", 1)[-1]
    return f"{ends[0][0].strip()}; codes untouched; saved by one process, reloaded exact"


for way in ("DDP", "FSDP"):
    what = "the whole model in each" if way == "DDP" else "the model sharded over them"
    row("two processes", f"gloo, {what} ({way}): 4 steps, save, reload")(partial(in_two_processes, way))


@row("table", "float latents of `direction` (ratio 4) are asked to learn: 2 steps, save, reload")
def latents(subject: Subject) -> str:
    model = hf_dirembed.compress(subject.trainee(subject.work / "stock"), method="direction", ratio=4)
    return learn(model, subject, "latents")


@row(
    "table",
    "packed codes are asked to learn, straight through: 2 steps, at .1 of their deviation, save, reload",
)
def packed(subject: Subject) -> str:
    return learn(subject.trainee(), subject, "codes")


def learn(model: PreTrainedModel, subject: Subject, what: str) -> str:
    """Trains for two steps with the codes unfrozen, saves and reloads."""
    table = model.train().unfreeze_codes().get_input_embeddings()
    before = table.weight.detach().clone()
    floats = [] if table.shadow is None else list(table.shadow.parameters())
    others = [p for p in model.parameters() if p.requires_grad and not any(p is each for each in floats)]
    groups = [{"params": others, "lr": 1e-4}]
    if floats:  # they reach another code by steps of the size of theirs
        groups.append({"params": floats, "lr": 0.1 * floats[0].std().item()})
    optimizer = torch.optim.AdamW(groups)
    batch = torch.utils.data.default_collate(subject.examples())
    losses = []
    for _ in range(3):
        loss = model.eval()(**batch).loss
        losses.append(loss.item())
        if len(losses) < 3:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0], losses
    changed = (table.weight != before).any(dim=1)
    assert changed[subject.inputs["input_ids"].unique()].any(), f"no {what} learnt"
    model.save_pretrained(subject.work / what)
    again = subject.trainee(subject.work / what).state_dict()
    for key, tensor in model.state_dict().items():
        exact(again[key], tensor)
    learnt = f"{what} learnt, {int(changed.sum()):,} rows"
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {learnt}; reloaded exact"
