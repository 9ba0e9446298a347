"""What takes a table's `weight` for one, and what asks a model for numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..action import Scene, action
from ..subjects import SUBJECTS


IDS = torch.tensor([[9, 3], [9, 40]])
STATES = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))


READINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "lookup": lambda w: F.embedding(IDS, w),
    "product": lambda w: STATES.double() @ w.double().T,
    "linear": lambda w: F.linear(STATES, w.float()),
    "from_pretrained": lambda w: nn.Embedding.from_pretrained(w)(IDS),
    "norm": lambda w: w.float().norm(dim=1),
    "cosine": lambda w: F.cosine_similarity(w[9:10].float(), w.float()),
    "clone": lambda w: F.linear(STATES, w.clone().float()),
    "rows": lambda w: w[IDS].float(),
    "slice": lambda w: w[3:9].float() @ STATES.T,
    "cat": lambda w: F.embedding(IDS, torch.cat([w, w])),
    "stack": lambda w: torch.stack([w, w]).float().mean(dim=(1, 2)),
    "view": lambda w: w.reshape(-1).float().sum(),
    "transposed": lambda w: STATES.to(w.dtype) @ w.t(),
    "copied": lambda w: F.embedding(IDS, copy.deepcopy(w)),
    "numpy": lambda w: torch.from_numpy(w.detach().float().numpy()[[9, 3]]),
    "list": lambda w: torch.tensor(w[9].tolist()),
    "item": lambda w: torch.tensor(w[9, 0].item()),
    "like": lambda w: torch.zeros_like(w).float() + STATES[:1, :1],
    "buffer": lambda w: F.embedding(IDS, torch.empty(w.shape).copy_(w)),
    "new": lambda w: w.new_zeros(2, 2) + 0.5,
    "einsum": lambda w: torch.einsum("vd,nd->nv", w.float(), STATES),
    "sum of squares": lambda w: w.float().pow(2).sum(),
    "largest": lambda w: w.max(),
    "as parameter": lambda w: F.linear(STATES, nn.Parameter(w.detach().clone().float(), requires_grad=False)),
    "chunks": lambda w: torch.cat([each.float() @ STATES.T for each in w.chunk(3)]),
    "data": lambda w: w.data.float().std(),
    "where": lambda w: torch.where(w.float() > 0, w.float(), 0.0),
}


@action(may_refuse=True, weight=3, exact=True)
@torch.no_grad()
def read_weight(model: Any, scene: Scene) -> Any:
    table = scene.draw.choice([model.get_input_embeddings(), model.get_output_embeddings()])
    name = scene.draw.choice(list(READINGS))
    if not getattr(table, "learning", False):  # latents that were unfrozen are weights, of their own shape
        scene.tell(READINGS[name](table.weight).double())
    return model


@action(weight=0.5, exact=True)
@torch.no_grad()
def dense_weight(model: Any, scene: Scene) -> Any:
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        scene.tell(table.dense_weight() if hasattr(table, "dense_weight") else table.weight)
    return model


@action(exact=True)
@torch.no_grad()
def look_up(model: Any, scene: Scene) -> Any:
    scene.tell(model.get_input_embeddings()(scene.inputs["input_ids"]))
    return model


@action()
@torch.no_grad()
def autocast(model: Any, scene: Scene) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = scene.ask(model.float())
    scene.tell(torch.tensor(float(logits.dtype == torch.bfloat16)))
    scene.tell(logits.to(torch.bfloat16))
    return model


@action()
def gradients(model: Any, scene: Scene) -> Any:
    model.float().requires_grad_(False)
    rows = model.get_input_embeddings()(scene.inputs["input_ids"]).detach().requires_grad_()
    if SUBJECTS[scene.name].per_layer:
        return model  # which need ids as well
    others = {name: each for name, each in scene.inputs.items() if name != "input_ids"}
    model(**others, inputs_embeds=rows).logits.sum().backward()
    scene.tell(rows.grad)
    return model


@action(may_refuse=True)
@torch.no_grad()
def embed_in_the_dtype_of_weight(model: Any, scene: Scene) -> Any:
    ids = {**scene.inputs}
    rows = model.get_input_embeddings()(ids.pop("input_ids"))
    model(**ids, inputs_embeds=rows.to(model.get_input_embeddings().weight.dtype))
    return model


@action(exact=True)
def count_parameters(model: Any, scene: Scene) -> Any:
    model.get_memory_footprint(), str(model), model.num_parameters(only_trainable=True)
    return model


@action(exact=True)
@torch.no_grad()
def generate(model: Any, scene: Scene) -> Any:
    if hasattr(model, "generate") and model.can_generate():
        model.generate(scene.inputs["input_ids"], max_new_tokens=2, do_sample=False, pad_token_id=0)
    return model


@action(weight=0.05)
def compile_eagerly(model: Any, scene: Scene) -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        expected, found = scene.ask(model), scene.ask(torch.compile(model, backend="eager"))
    assert torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2), "compiled, it answers otherwise"
    return model
