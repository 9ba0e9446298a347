"""The rows of drop_in.py: each does one thing that people do with a model, and says what came of it."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from drop_in_subject import SENTENCES, Skip, Subject, close, exact, row, same_codes
from safetensors.torch import save_file
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig, Trainer, TrainingArguments

from hf_dirembed import CompressedEmbedding


PROMPT = "The three most important things to know about the sea are"
NEW_TOKENS = 20

FRESH = """
import sys
from pathlib import Path

class Block:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "hf_dirembed":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Block())
import torch, transformers
from safetensors.torch import load_file

source, target, auto, inputs = sys.argv[1:]
inputs = load_file(inputs)
expected = inputs.pop("expected")
for folder in (source, target):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], expected), "it answers otherwise"
    model.save_pretrained(target)
"""


@row("load", "AutoModel, the stock class, saved twice and loaded")
def load(subject: Subject) -> str:
    assert isinstance(subject.model.get_input_embeddings(), CompressedEmbedding)
    assert type(subject.stock).__module__.startswith("transformers.models."), type(subject.stock)
    assert type(subject.stock.get_input_embeddings()) is torch.nn.Embedding
    found = subject.answer(subject.load(auto=getattr(transformers, subject.stock_name)))
    if subject.auto.__name__ == "AutoModel" and found.shape != subject.expected.shape:
        raise Skip(f"{subject.stock_name} has a head of its own")
    exact(found, subject.expected)
    model = subject.model
    for name in ("two", "three"):
        model.save_pretrained(subject.work / name)
        model = subject.load(subject.work / name)
    return f"{exact(subject.answer(model), subject.expected)}; expanded: {close(subject.answer(subject.stock), found)}"


@row("trust_remote_code", "in a fresh process without the plugin, saved there, loaded again")
def trust_remote_code(subject: Subject) -> str:
    with torch.no_grad():
        expected = subject.model(**subject.inputs)[0].contiguous()
    save_file({**subject.inputs, "expected": expected}, subject.work / "inputs.safetensors")
    files = (subject.compressed, subject.work / "resaved", subject.auto.__name__, subject.work / "inputs.safetensors")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", FRESH, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr.strip().rsplit("\n", 1)[-1]
    return "exact, twice"


@row("pipeline", "text-generation", "causal")
def text_generation(subject: Subject) -> str:
    texts = []
    for folder in ("compressed", "stock"):
        pipe = transformers.pipeline("text-generation", str(subject.work / folder))
        texts.append(pipe(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1], f"{texts[0]!r} is not {texts[1]!r}"
    return f"same text, {NEW_TOKENS} tokens"


@row("pipeline", "feature-extraction", "encoder")
def feature_extraction(subject: Subject) -> str:
    pipes = (transformers.pipeline("feature-extraction", str(subject.work / name)) for name in ("compressed", "stock"))
    return close(*(pipe(SENTENCES[1], return_tensors=True) for pipe in pipes))


@row("SentenceTransformer", "load, encode, save, reload", "encoder")
def sentence_transformer(subject: Subject) -> str:
    if importlib.util.find_spec("sentence_transformers") is None:
        raise Skip("sentence_transformers is not installed")
    from sentence_transformers import SentenceTransformer

    ours, stock = (SentenceTransformer(str(subject.work / name), device="cpu") for name in ("compressed", "stock"))
    found = ours.encode(SENTENCES, convert_to_tensor=True)
    ours.save_pretrained(str(subject.work / "sentences"))
    again = SentenceTransformer(str(subject.work / "sentences"), device="cpu")
    modules = [[type(module).__name__ for module in each] for each in (ours, stock, again)]
    assert modules[0] == modules[1] == modules[2], modules
    reloaded = exact(again.encode(SENTENCES, convert_to_tensor=True), found)
    expected = stock.encode(SENTENCES, convert_to_tensor=True)
    return f"{close(found, expected)}; reloaded {reloaded}; modules {', '.join(modules[0])}"


@row("Trainer", "4 steps with gradient checkpointing, checkpoint at 2, resumed there")
def trainer(subject: Subject) -> str:
    def make(model: PreTrainedModel) -> Trainer:
        options = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-4, "per_device_train_batch_size": 3}
        options |= {"gradient_checkpointing": True, "disable_tqdm": True, "report_to": [], "use_cpu": True}
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
    last = subject.trainee(subject.work / "runs" / "checkpoint-4").state_dict()
    resumed = second.state_dict()
    for key, tensor in first.state_dict().items():
        exact(resumed[key], tensor)
        exact(last[key], tensor)
    return f"loss {before:.3f} -> {after:.3f}; codes untouched; resumed and reloaded exact"


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


def int8_of_torchao() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quantised(package: str, settings: Callable[[], Any], subject: Subject) -> str:
    if importlib.util.find_spec(package) is None:
        raise Skip(f"{package} is not installed")
    model = subject.load(quantization_config=settings(), dtype=torch.float32)
    same_codes(model, subject)
    model.save_pretrained(subject.work / package)  # before it runs: bitsandbytes then repacks weights on CPU
    found = subject.answer(model)
    again = subject.load(subject.work / package)
    assert again.config.quantization_config.quant_method == package
    exact(subject.answer(again), found)
    difference = (found - subject.expected).norm() / subject.expected.norm()
    assert 0 < difference < 0.5, f"relative difference {difference:.2f} to the unquantised body"
    return f"relative difference {difference:.3f} to the unquantised body; reloaded exact"


for package, kind, make in (
    ("bitsandbytes", "int8", lambda: BitsAndBytesConfig(load_in_8bit=True)),
    ("bitsandbytes", "nf4", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    ("torchao", "int8", int8_of_torchao),
):
    row("quantised", f"the body in {kind} of {package}: load, save, reload")(partial(quantised, package, make))


def generated(model: PreTrainedModel, subject: Subject, **options: Any) -> Tensor:
    torch.manual_seed(0)
    inputs = dict(subject.tokenizer(PROMPT, return_tensors="pt"))
    length = inputs["input_ids"].shape[1]
    if options.pop("from_rows", False):
        inputs, length = {"inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids")), **inputs}, 0
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False, **options}
    return model.generate(**inputs, **options)[0, length:]


def generate(options: dict[str, Any], subject: Subject) -> str:
    found, expected = (generated(model, subject, **options) for model in (subject.model, subject.stock))
    assert torch.equal(found, expected), f"{found.tolist()} is not {expected.tolist()}"
    return f"same text, {len(found)} tokens"


def assisted(subject: Subject) -> str:
    found = generated(subject.model, subject, assistant_model=copy.deepcopy(subject.model))
    expected = generated(subject.stock, subject)
    assert torch.equal(found, expected), f"{found.tolist()} is not {expected.tolist()}"
    return f"same text, {len(found)} tokens"


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam search, 3": {"num_beams": 3},
    "sampling with a seed": {"do_sample": True, "top_k": 20},
    "static cache": {"cache_implementation": "static"},
    "from `inputs_embeds`": {"from_rows": True},
}
for way, ways_options in WAYS.items():
    row("generate", way, "causal")(partial(generate, ways_options))
row("generate", "assisted by a copy of itself", "causal")(assisted)


@row("resize", "8 tokens more, saved, reloaded, back again, 64 fewer")
def resize(subject: Subject) -> str:
    model = subject.load()
    size = model.get_input_embeddings().num_embeddings
    if int(subject.inputs["input_ids"].max()) >= size - 64:
        raise Skip("the sentences need the last 64 tokens")
    width = size if subject.kind == "causal" else subject.expected.shape[-1]
    model.resize_token_embeddings(size + 8)
    more = subject.answer(model)
    differences = [close(more[:, :width], subject.expected)]
    model.save_pretrained(subject.work / "resized")
    exact(subject.answer(subject.load(subject.work / "resized")), more)
    model.resize_token_embeddings(size)
    differences.append(close(subject.answer(model), subject.expected))
    model.resize_token_embeddings(size - 64)
    fewer = subject.answer(model)
    differences.append(close(fewer, subject.expected[:, : fewer.shape[-1]]))
    return "; ".join(differences) + "; reloaded exact"


def other_shape(subject: Subject) -> dict[str, Tensor]:
    ids = subject.inputs["input_ids"][:2, :5].contiguous()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def exported(subject: Subject) -> torch.export.ExportedProgram:
    model = subject.load()
    model.config.use_cache = False
    inputs = {key: subject.inputs[key] for key in ("input_ids", "attention_mask")}
    shapes = {key: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for key in inputs}
    with torch.no_grad():
        return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)


@row("export", "torch.export, run with another shape")
@torch.no_grad()
def export(subject: Subject) -> str:
    inputs = other_shape(subject)
    return close(exported(subject).module()(**inputs)[0], subject.stock(**inputs)[0])


@row("ONNX", "exported, run in onnxruntime with another shape")
@torch.no_grad()
def onnx(subject: Subject) -> str:
    if any(importlib.util.find_spec(package) is None for package in ("onnxruntime", "onnxscript")):
        raise Skip("onnxruntime or onnxscript is not installed")
    import onnxruntime

    folder = subject.work / "onnx"
    folder.mkdir()
    torch.onnx.export(exported(subject), dynamo=True, verbose=False).save(folder / "model.onnx")
    inputs = other_shape(subject)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    wanted = {each.name for each in session.get_inputs()}
    found = session.run(None, {key: value.numpy() for key, value in inputs.items() if key in wanted})[0]
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    stock = sum(parameter.nbytes for parameter in subject.stock.parameters()) / 2**20
    difference = close(torch.from_numpy(found), subject.stock(**inputs)[0])
    return f"{difference}; {size:.0f} MiB, the expanded model's tensors {stock:.0f} MiB"


@row("compile", "torch.compile, the whole graph, backend eager")
def compiled(subject: Subject) -> str:
    torch.compiler.reset()
    return close(subject.answer(torch.compile(subject.model, fullgraph=True, backend="eager")), subject.expected)


@row("placement", 'device_map="auto"')
def device_map(subject: Subject) -> str:
    return exact(subject.answer(subject.load(device_map="auto")), subject.expected)


@row("placement", "half of it offloaded to disk, run, saved, reloaded")
def disk_offload(subject: Subject) -> str:
    room = sum(parameter.nbytes for parameter in subject.model.parameters()) // 2
    options = {"device_map": "auto", "max_memory": {"cpu": room}, "offload_folder": subject.work / "offload"}
    model = subject.load(**options)
    away = sum(parameter.is_meta for parameter in model.parameters())
    assert away, "nothing was offloaded"
    difference = close(subject.answer(model), subject.expected)
    model.save_pretrained(subject.work / "from-disk")
    reloaded = exact(subject.answer(subject.load(subject.work / "from-disk")), subject.expected)
    return f"{away} tensors on disk; {difference}; reloaded {reloaded}"


@row("placement", ".half(), saved, reloaded")
def half(subject: Subject) -> str:
    model = subject.load().half()
    difference = close(subject.answer(model).float(), subject.expected, within=2e-2)
    model.save_pretrained(subject.work / "half")
    again = subject.load(subject.work / "half").state_dict()
    for key, tensor in model.state_dict().items():
        exact(again[key], tensor)
    return f"{difference} to float32; reloaded exact"


@row("copies", "copy.deepcopy")
def deep_copy(subject: Subject) -> str:
    return exact(subject.answer(copy.deepcopy(subject.model)), subject.expected)


@row("copies", "pickle")
def pickled(subject: Subject) -> str:
    return exact(subject.answer(pickle.loads(pickle.dumps(subject.model))), subject.expected)


@row("copies", "saved in shards of 20 MB")
def shards(subject: Subject) -> str:
    folder: Path = subject.work / "shards"
    subject.model.save_pretrained(folder, max_shard_size="20MB")
    files = len(list(folder.glob("*.safetensors")))
    assert files > 1, "one file"
    return f"{exact(subject.answer(subject.load(folder)), subject.expected)}, {files} files"
