"""Copies, and what is saved and loaded again."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
import transformers
from safetensors.torch import load_model, save_model

from hf_dirembed.remote.modeling_dirembed import DirEmbedModelMixin

from ..action import Scene, action
from ..subjects import SUBJECTS, another


@action(exact=True)
def deep_copy(model: Any, scene: Scene) -> Any:
    return copy.deepcopy(model)


@action(exact=True, weight=0.5)
def pickled(model: Any, scene: Scene) -> Any:
    return pickle.loads(pickle.dumps(model))


@action(exact=True)
def torch_saved(model: Any, scene: Scene) -> Any:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    other.load_state_dict(torch.load(file, weights_only=True), assign=scene.draw.random() < 0.3)
    other.tie_weights()
    return other


@action(exact=True)
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


@action(exact=True)
def save_gathered(model: Any, scene: Scene) -> Any:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(scene.folder, state_dict=state)
    if _loses_its_head(model):
        return model
    loader = getattr(transformers, SUBJECTS[scene.name].auto)
    loaded = loader.from_pretrained(scene.folder, dtype="auto").eval()
    for (_, kept), (_, computed) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        computed.data = kept.data.clone()  # in no file: `half` rounds rotary frequencies, loading computes them again
    return loaded


@action(exact=True)
def call_functionally(model: Any, scene: Scene) -> Any:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    torch.func.functional_call(model, tensors, kwargs=scene.inputs)
    return model


@action(may_refuse=True, rebases=True)
def load_another_model(model: Any, scene: Scene) -> Any:
    """One of other codes, which may be of another layout; in a strange place, its table alone."""
    other = copy.deepcopy(model)
    stranger = another(scene.name, isinstance(model, DirEmbedModelMixin))
    other.load_state_dict(stranger.state_dict(), strict=scene.draw.random() < 0.5, assign=scene.draw.random() < 0.3)
    other.tie_weights()
    return other


@action(may_refuse=True)
def load_codes_alone(model: Any, scene: Scene) -> Any:
    if not isinstance(model, DirEmbedModelMixin) or getattr(model.get_input_embeddings(), "learning", False):
        return model  # latents that learn may be any floats
    state, mine = another(scene.name, True).state_dict(), model.state_dict()
    state = {name: each for name, each in state.items() if name in mine and each.shape == mine[name].shape}
    model.load_state_dict({name: each for name, each in state.items() if name.endswith("tokens.weight")}, strict=False)
    return model
