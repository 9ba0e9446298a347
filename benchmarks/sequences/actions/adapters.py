"""Adapters."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..action import Scene, action
from ..subjects import SUBJECTS


def _peft() -> Any:
    import peft

    return peft


@action(weight=0.6)
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


@action(may_refuse=True, weight=0.7)
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
