"""What people do with a model: each action takes one, changes it or makes another of it, and returns that.

An action is done to the compressed and to the stock model with the same random choices. Where it asks for what a
compressed model refuses, it says so (`may_refuse`).
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim import swa_utils

from hf_dirembed.remote.modeling_dirembed import DirEmbedModelMixin

from .subjects import SUBJECTS, VOCAB


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Scene:
    """Where a sequence is.

    Attributes:
        name: The subject's.
        folder: Where it may write.
        draw: Random choices, the same for both models.
    """

    name: str
    folder: Path
    draw: Random

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the models are asked."""
        return SUBJECTS[self.name].inputs()

    def ask(self, model: nn.Module, **others: Any) -> Tensor:
        """The logits."""
        logits: Tensor = model(**{**self.inputs, **others}).logits
        return logits


@dataclass(frozen=True)
class Action:
    """Something that people do.

    Attributes:
        do: Takes a model and the scene; gives the model to go on with.
        may_refuse: Whether a compressed model may answer with an error of ours.
        rebases: Whether the two may be other models afterwards: the stock one is made anew of the compressed one.
        compares: Whether they are to answer alike before that.
    """

    do: Callable[[Any, Scene], Any]
    may_refuse: bool = False
    rebases: bool = False
    compares: bool = False


ACTIONS: dict[str, Action] = {}


def action(
    *, may_refuse: bool = False, rebases: bool = False, compares: bool = False
) -> Callable[[Callable[[Any, Scene], Any]], Any]:
    """Registers a function as an action by its name."""

    def register(do: Callable[[Any, Scene], Any]) -> Any:
        ACTIONS[do.__name__] = Action(do, may_refuse, rebases, compares)
        return do

    return register


# --- casts and moves ---------------------------------------------------------------------------------------------


@action()
def cast(model: Any, scene: Scene) -> Any:
    return model.to(scene.draw.choice(FLOATS))


@action()
def cast_vectors_by_hand(model: Any, scene: Scene) -> Any:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = parameter.data.float()
    return model.float()


@action()
def cast_all_by_hand(model: Any, scene: Scene) -> Any:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32)
    return model


@action()
def through_a_vector(model: Any, scene: Scene) -> Any:
    parameters = list(model.float().parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters), parameters)
    for parameter in parameters:
        parameter.data = parameter.data.clone()  # views of one vector are not saved
    return model


@action()
def share_memory(model: Any, scene: Scene) -> Any:
    return model.share_memory()


@action()
def freeze_and_unfreeze(model: Any, scene: Scene) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parameter in model.parameters():
        parameter.requires_grad = True
    return model.requires_grad_(scene.draw.random() < 0.5)


@action()
def train_and_eval(model: Any, scene: Scene) -> Any:
    return model.train().eval()


# --- copies ------------------------------------------------------------------------------------------------------


@action()
def deep_copy(model: Any, scene: Scene) -> Any:
    return copy.deepcopy(model)


@action()
def pickled(model: Any, scene: Scene) -> Any:
    return pickle.loads(pickle.dumps(model))


@action()
def torch_saved(model: Any, scene: Scene) -> Any:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    other.load_state_dict(torch.load(file, weights_only=True), assign=scene.draw.random() < 0.3)
    other.tie_weights()
    return other


@action()
def safetensors_saved(model: Any, scene: Scene) -> Any:
    save_model(model, str(scene.folder / "model.safetensors"))
    other = copy.deepcopy(model)
    load_model(other, scene.folder / "model.safetensors")
    return other


@action()
def save_and_load(model: Any, scene: Scene) -> Any:
    options: dict[str, Any] = {}
    if scene.draw.random() < 0.3:
        options["max_shard_size"] = "8KB"
    model.save_pretrained(scene.folder, **options)
    how: dict[str, Any] = {"dtype": scene.draw.choice(["auto", "auto", torch.float32, torch.bfloat16])}
    if scene.draw.random() < 0.3:
        how["device_map"] = "cpu"
    if _loses_its_head(model):
        return model.to(model.dtype if how["dtype"] == "auto" else how["dtype"])
    loader = getattr(transformers, SUBJECTS[scene.name].auto)
    return loader.from_pretrained(scene.folder, **how).eval()


def _loses_its_head(model: Any) -> bool:
    """Whether it is a stock model that shares weights which its config does not tie: it loads with a random head."""
    weights = [module._parameters.get("weight") for module in model.modules()]
    shared = len([each for each in weights if each is not None]) > len(
        {id(each) for each in weights if each is not None}
    )
    return shared and not model.config.tie_word_embeddings and not isinstance(model, DirEmbedModelMixin)


@action()
def save_gathered(model: Any, scene: Scene) -> Any:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(scene.folder, state_dict=state)
    if _loses_its_head(model):
        return model
    loader = getattr(transformers, SUBJECTS[scene.name].auto)
    return loader.from_pretrained(scene.folder, dtype="auto").eval()


@action()
def call_functionally(model: Any, scene: Scene) -> Any:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.func.functional_call(model, tensors, kwargs=scene.inputs)
    return model


# --- sizes and ties ----------------------------------------------------------------------------------------------


@action(rebases=True, compares=True)
def resize(model: Any, scene: Scene) -> Any:
    size = VOCAB + scene.draw.randint(-VOCAB // 3, 20)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


@action()
def tie_again(model: Any, scene: Scene) -> Any:
    model.tie_weights()
    return model


@action(may_refuse=True, rebases=True)
def tie(model: Any, scene: Scene) -> Any:
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


@action()
def untie(model: Any, scene: Scene) -> Any:
    model.config.tie_word_embeddings = False
    return model


@action()
def set_the_same(model: Any, scene: Scene) -> Any:
    model.set_input_embeddings(model.get_input_embeddings())
    return model


@action(may_refuse=True)
def tie_by_hand(model: Any, scene: Scene) -> Any:
    head = model.get_output_embeddings()
    dense = nn.Linear(*reversed(head.weight.shape), bias=False)
    dense.weight = head.weight
    return model


# --- training and averages ---------------------------------------------------------------------------------------


def _train(model: Any, scene: Scene, steps: int = 1) -> Any:
    tables = {
        id(p) for module in (model.get_input_embeddings(), model.get_output_embeddings()) for p in module.parameters()
    }
    tables |= {
        id(p) for name, p in model.named_parameters() if "per_layer.weight" in name or "_per_layer.blocks" in name
    }
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) not in tables
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.01)
    labels = scene.inputs.get("decoder_input_ids", scene.inputs["input_ids"])
    for _ in range(steps):
        loss = model.eval()(**scene.inputs, labels=labels).loss  # without dropout, which draws
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@action()
def train_the_body(model: Any, scene: Scene) -> Any:
    return _train(model.float(), scene, steps=2)


@action(rebases=True)
def train_all(model: Any, scene: Scene) -> Any:
    model.float().requires_grad_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    labels = scene.inputs.get("decoder_input_ids", scene.inputs["input_ids"])
    model.train()(**scene.inputs, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@action(rebases=True)
def train_codes(model: Any, scene: Scene) -> Any:
    if not isinstance(model, DirEmbedModelMixin):
        return model
    train_all(model.float().unfreeze_codes(), scene)
    return model.freeze_codes() if scene.draw.random() < 0.7 else model


@action()
def unfreeze_codes(model: Any, scene: Scene) -> Any:
    if isinstance(model, DirEmbedModelMixin):
        model.unfreeze_codes()
    return model


@action()
def averaged_model(model: Any, scene: Scene) -> Any:
    kind = scene.draw.randrange(4)
    options: dict[str, Any] = [
        {},
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
        {"avg_fn": swa_utils.get_ema_avg_fn(0.99)},
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True},
    ][kind]
    average = swa_utils.AveragedModel(model.float(), **options)
    for _ in range(2):
        average.update_parameters(model)
        _train(model, scene)
    average.update_parameters(model)
    for mine, theirs in zip(average.module.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)  # positions, of which `use_buffers` makes other integers
    return average.module


@action()
@torch.no_grad()
def ema_by_hand(model: Any, scene: Scene) -> Any:
    ema = copy.deepcopy(model.float())
    with torch.enable_grad():
        _train(model, scene)
    kind = scene.draw.randrange(5)
    for mine, theirs in zip(ema.parameters(), model.parameters(), strict=True):
        if kind == 0:
            mine.copy_(0.9 * mine + 0.1 * theirs)
        elif kind == 1:
            mine.mul_(0.9).add_(theirs, alpha=0.1)
        elif kind == 2:
            mine.data.mul_(0.999).add_(theirs.data, alpha=0.001)
        elif kind == 3:
            mine.sub_(0.25 * (mine - theirs))
        else:
            mine.data = 0.5 * mine.data + 0.5 * theirs.data
    return ema


@action()
@torch.no_grad()
def soup(model: Any, scene: Scene) -> Any:
    other = copy.deepcopy(model.float())
    with torch.enable_grad():
        _train(other, scene)
    mine, theirs = model.state_dict(), other.state_dict()
    if scene.draw.random() < 0.5:
        state = {
            name: mine[name].lerp(theirs[name], 0.3) if mine[name].is_floating_point() else mine[name] for name in mine
        }
    else:
        state = {name: 0.5 * mine[name] + 0.5 * theirs[name] for name in mine}
    model.load_state_dict(state)
    return model


@action()
@torch.no_grad()
def ema_of_a_state_dict(model: Any, scene: Scene) -> Any:
    average = copy.deepcopy(model)
    for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(0.9 * mine + 0.1 * theirs)
    return average


@action(may_refuse=True)
@torch.no_grad()
def write_to_weight(model: Any, scene: Scene) -> Any:
    other, weight = copy.deepcopy(model), model.get_input_embeddings().weight
    kind = scene.draw.randrange(7)
    if kind == 0:
        weight[9] = torch.randn(weight.shape[1]).to(weight.dtype)
    elif kind == 1:
        weight.data.normal_()
    elif kind == 2:
        weight.mul_(2)
    elif kind == 3:
        nn.init.zeros_(weight)
    elif kind == 4:
        weight.data = torch.zeros_like(weight.data)
    elif kind == 5:
        model.get_input_embeddings().weight = nn.Parameter(torch.randn(weight.shape[0], 32))
    else:
        weight.data[5:9] = 0
    scene.ask(model)
    return other


@action(may_refuse=True)
def decay_all(model: Any, scene: Scene) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 - 1e-3)
    scene.ask(model)
    return other


# --- readings ----------------------------------------------------------------------------------------------------


@action(may_refuse=True)
@torch.no_grad()
def read_weight(model: Any, scene: Scene) -> Any:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ids, kind = scene.inputs["input_ids"], scene.draw.randrange(6)
    if getattr(embedding, "learning", False):
        return model  # latents that were unfrozen are weights, of their own shape
    if kind == 0:
        read: Any = F.embedding(ids, embedding.weight)
    elif kind == 1:
        read = torch.randn(3, 32, dtype=torch.float64) @ head.weight.double().T
    elif kind == 2:
        read = nn.Embedding.from_pretrained(embedding.weight)(ids)
    elif kind == 3:
        read = embedding.weight.float().norm(dim=1)
    elif kind == 4:
        read = F.cosine_similarity(embedding.weight[9:10].float(), embedding.weight.float())
    else:
        read = F.linear(torch.randn(3, 32), head.weight.float())
    assert read.shape[-1] in (32, VOCAB) or read.shape[0] == len(embedding.weight), read.shape
    return model


@action(may_refuse=True)
@torch.no_grad()
def embed_in_the_dtype_of_weight(model: Any, scene: Scene) -> Any:
    ids = {**scene.inputs}
    rows = model.get_input_embeddings()(ids.pop("input_ids"))
    model(**ids, inputs_embeds=rows.to(model.get_input_embeddings().weight.dtype))
    return model


@action()
def count_parameters(model: Any, scene: Scene) -> Any:
    model.get_memory_footprint(), str(model), model.num_parameters(only_trainable=True)
    return model


@action()
@torch.no_grad()
def generate(model: Any, scene: Scene) -> Any:
    if hasattr(model, "generate") and model.can_generate():
        model.generate(scene.inputs["input_ids"], max_new_tokens=2, do_sample=False, pad_token_id=0)
    return model


@action()
def compile_eagerly(model: Any, scene: Scene) -> Any:
    torch._dynamo.reset()
    with torch.no_grad():
        expected, found = scene.ask(model), scene.ask(torch.compile(model, backend="eager"))
    assert torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2), "compiled, it answers otherwise"
    return model


# --- PEFT --------------------------------------------------------------------------------------------------------


def _peft() -> Any:
    import peft

    return peft


@action()
def lora(model: Any, scene: Scene) -> Any:
    peft = _peft()
    torch.manual_seed(0)
    targets = list(SUBJECTS[scene.name].adapted)
    adapted = peft.get_peft_model(model.float(), peft.LoraConfig(target_modules=targets, r=2, lora_alpha=4))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    labels = scene.inputs.get("decoder_input_ids", scene.inputs["input_ids"])
    adapted.eval()(**scene.inputs, labels=labels).loss.backward()
    optimizer.step()
    if scene.draw.random() < 0.3:
        adapted.save_pretrained(scene.folder / "adapter")
        return peft.PeftModel.from_pretrained(adapted.unload(), scene.folder / "adapter").merge_and_unload()
    return adapted.merge_and_unload() if scene.draw.random() < 0.7 else adapted.unload()


@action(may_refuse=True)
def peft_of_tables(model: Any, scene: Scene) -> Any:
    peft, other = _peft(), copy.deepcopy(model.float())
    paths = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    table, head = (paths[id(module)] for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    configs = [
        peft.LoraConfig(target_modules=[table], r=2),
        peft.LoraConfig(target_modules=[head], r=2),
        peft.LoraConfig(target_modules=list(SUBJECTS[scene.name].adapted), modules_to_save=[table]),
        peft.LoraConfig(target_modules=list(SUBJECTS[scene.name].adapted), modules_to_save=[table, head]),
        peft.LoraConfig(
            target_modules=list(SUBJECTS[scene.name].adapted), modules_to_save=[table], ensure_weight_tying=True
        ),
        peft.TrainableTokensConfig(token_indices=[9, 10], target_modules=[table]),
    ]
    adapted = peft.get_peft_model(model, scene.draw.choice(configs))
    scene.ask(adapted)
    return other
