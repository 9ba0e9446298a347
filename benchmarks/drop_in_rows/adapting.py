"""PEFT: adapters of the body, and what wants a dense table."""

from __future__ import annotations

import importlib.util

import torch
from drop_in_subject import Skip, Subject, close, exact, row, same_codes


@row("PEFT", "LoRA on all linear layers of the body: 3 steps, save, reload, merge, save")
def lora(subject: Subject) -> str:
    if importlib.util.find_spec("peft") is None:
        raise Skip("peft is not installed")
    import peft

    task = "CAUSAL_LM" if subject.kind == "causal" else "SEQ_CLS"
    adapted = peft.get_peft_model(subject.trainee(), peft.LoraConfig(target_modules="all-linear", task_type=task))
    optimizer = torch.optim.AdamW([p for p in adapted.train().parameters() if p.requires_grad], lr=1e-3)
    batch = torch.utils.data.default_collate(subject.examples())
    losses = []
    for _ in range(4):  # the last step is not taken, its loss is that of three
        loss = adapted(**batch).loss
        losses.append(loss.item())
        if len(losses) < 4:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0], losses
    answer = torch.no_grad()(lambda model: model.eval()(**subject.inputs)[0])
    expected = answer(adapted)
    adapted.save_pretrained(subject.work / "adapter")
    exact(answer(peft.PeftModel.from_pretrained(subject.trainee(), subject.work / "adapter")), expected)
    merged = adapted.merge_and_unload()
    same_codes(merged, subject)
    merged.save_pretrained(subject.work / "merged")
    exact(answer(subject.trainee(subject.work / "merged")), answer(merged))
    difference = close(answer(merged), expected)
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; reloaded exact; merged {difference}; merged and reloaded exact"


@row("PEFT", "LoRA and TrainableTokens on the table, modules_to_save of it")
def refused(subject: Subject) -> str:
    if importlib.util.find_spec("peft") is None:
        raise Skip("peft is not installed")
    import peft

    task = "CAUSAL_LM" if subject.kind == "causal" else "SEQ_CLS"
    table = subject.model.get_input_embeddings()
    target = next(name for name, module in subject.model.named_modules() if module is table).rpartition(".")[2]
    configs = (
        peft.LoraConfig(target_modules=[target], task_type=task),
        peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=[target], task_type=task),
        peft.LoraConfig(target_modules="all-linear", modules_to_save=[target], task_type=task),
    )
    said = []
    for config in configs:
        try:
            peft.get_peft_model(subject.trainee(), config)
        except ValueError as error:  # of PEFT, which names the module, or of this package
            said.append(str(error).partition("\n")[0])
        else:
            raise AssertionError(f"{config.peft_type} is not refused")
    return "refused: " + " / ".join(f"{each[:60]}..." for each in said)
