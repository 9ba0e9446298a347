"""Compressed models in vLLM answer what they answer in transformers; run by `tests/engines/vllm.sh`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from words import server, tokenizer_of_words, word

import hf_dirembed


vllm = pytest.importorskip("vllm", reason="vLLM is not installed: tests/engines/vllm.sh makes an environment for it")
pytestmark = pytest.mark.vllm

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # vLLM stumbles over llvmlite, which transformers' answers were made with
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions of this file run in its processes
}
VOCAB = 500  # no multiple of 64, to which vLLM pads
PROMPTS = [[5, 17, 300, 42], [499, 3, 256, 255, 8, 9], [80]]
DECODER: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 256,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(**arguments: Any) -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, **arguments))


def gemma3() -> PreTrainedModel:
    config = transformers.Gemma3TextConfig(**DECODER, tie_word_embeddings=True)
    return quieter(transformers.Gemma3ForCausalLM(config))


def gemma4() -> PreTrainedModel:
    """Of per-layer tables."""
    per_layer = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 32, "global_head_dim": 64}
    config = transformers.Gemma4TextConfig(**DECODER, **per_layer, num_kv_shared_layers=0, tie_word_embeddings=True)
    return quieter(transformers.Gemma4ForCausalLM(config))


def quieter(model: PreTrainedModel) -> PreTrainedModel:
    """Lets the layers be heard beside the residual stream, or the answer is the last token over and over."""
    with torch.no_grad():
        model.get_input_embeddings().weight *= 0.02
    return model


def bert() -> PreTrainedModel:
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    return transformers.BertModel(config)


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama, tied": (lambda: llama(tie_word_embeddings=True), {"bits": 3}),
    "llama, untied": (lambda: llama(tie_word_embeddings=False), {"bits": {"model.embed_tokens": 2, "lm_head": 4}}),
    "llama, head alone": (lambda: llama(tie_word_embeddings=False), {"bits": 3, "tables": ["lm_head"]}),
    "llama, floats": (lambda: llama(tie_word_embeddings=True), {"rank": 40, "method": "direction"}),
    "gemma3": (gemma3, {"bits": 3}),
    "gemma4": (gemma4, {"bits": 4}),
    "bert": (bert, {"bits": 3}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes compressed models, each once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            model, options = MODELS[name]
            made[name] = tmp_path_factory.mktemp("model")
            hf_dirembed.compress(model().eval(), **options).save_pretrained(made[name])
        return made[name]

    return make


@contextmanager
def served(folder: Path, **options: Any) -> Iterator[Any]:
    """A compressed model in vLLM."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1" if options.get("tensor_parallel_size", 1) > 1 else "auto"
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4, **options}
    engine = vllm.LLM(str(folder), skip_tokenizer_init="tokenizer" not in options, **settings)
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()


def tokens_of(engine: Any) -> list[list[int]]:
    settings = vllm.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in PROMPTS], settings, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def tokens_of_transformers(folder: Path) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    return [model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist() for ids in PROMPTS]


CASES = [
    ("llama, tied", {}),
    ("llama, tied", {"model_impl": "transformers"}),
    ("llama, tied", {"tensor_parallel_size": 2}),
    ("llama, tied", {"enforce_eager": False}),
    ("llama, untied", {}),
    ("llama, untied", {"tensor_parallel_size": 2, "model_impl": "transformers"}),
    ("llama, head alone", {}),
    ("llama, floats", {}),
    ("gemma3", {}),
    ("gemma3", {"model_impl": "transformers"}),
    ("gemma3", {"tensor_parallel_size": 2}),
    ("gemma4", {}),
    ("gemma4", {"tensor_parallel_size": 2}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name} {options or ''}" for name, options in CASES])
def test_tokens_are_those_of_transformers(folders, name, options):
    folder = folders(name)
    expected = tokens_of_transformers(folder)
    assert len({token for tokens in expected for token in tokens}) > 8  # the models say something
    with served(folder, **options) as engine:
        assert tokens_of(engine) == expected


@pytest.mark.parametrize("options", [{}, {"model_impl": "transformers"}, {"tensor_parallel_size": 2}], ids=str)
def test_embeddings_are_those_of_transformers(folders, options, tmp_path):
    folder = folders("bert")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    from vllm.config import PoolerConfig

    pooler = {"seq_pooling_type": "CLS", "use_activation": False}
    tokenizer_of_words(VOCAB).save_pretrained(tmp_path)
    options = {"tokenizer": str(tmp_path), "pooler_config": PoolerConfig(**pooler), **options}
    with served(folder, runner="pooling", **options) as engine:
        outputs = engine.embed([{"prompt_token_ids": ids} for ids in PROMPTS], use_tqdm=False)
    for ids, output in zip(PROMPTS, outputs, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).last_hidden_state[0, 0]
        assert torch.allclose(torch.tensor(output.outputs.embedding), expected, atol=2e-5)


def test_codes_stay_packed(folders):
    """No dense table is anywhere in the model, and the head that is tied has no codes of its own."""
    with served(folders("llama, tied")) as engine:
        (found,) = engine.apply_model(_shapes_and_dtypes)
    sizes = [(tuple(shape), dtype) for shape, dtype in found]
    assert {shape for shape, _ in sizes} & {(VOCAB, 128), (512, 128)} == set()
    codes = [shape for shape, dtype in sizes if dtype == "torch.uint8" and len(shape) == 2]
    assert [shape[0] for shape in codes] == [VOCAB]


def _shapes_and_dtypes(model: nn.Module) -> list[tuple[list[int], str]]:
    held = {each.data_ptr(): each for each in model.parameters()}.values()  # layers that are tied share the memory
    return [(list(each.shape), str(each.dtype)) for each in held]


def test_a_body_that_is_quantised_beside_the_table(folders, tmp_path):
    """vLLM's answers are those that it gives to the same body beside the expanded table."""
    for name in ("compressed", "dense"):
        shutil.copytree(folders("llama, untied"), tmp_path / name)
    model = hf_dirembed.expand(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    model.save_pretrained(tmp_path / "dense")
    answers = []
    for name in ("compressed", "dense"):
        quantise_body(tmp_path / name)
        with served(tmp_path / name) as engine:
            answers.append(tokens_of(engine))
            assert engine.apply_model(_method_of_the_body) == ["CompressedTensorsLinearMethod"]
    assert answers[0] == answers[1]
    assert answers[0] != tokens_of_transformers(folders("llama, untied"))


def _method_of_the_body(model: nn.Module) -> str:
    return type(model.get_submodule("model.layers.0.mlp.down_proj").quant_method).__name__


def quantise_body(folder: Path) -> None:
    """Writes the linear layers in 8 bits, as llm-compressor does, and tells the config."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        scale = tensors[name].abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def spoil(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def _shorten(name: str) -> Any:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def _flip(tensors: dict[str, Tensor]) -> None:
    tensors["model.embed_tokens.weight"][7, 0] ^= 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop("model.embed_tokens.steps_weight"), r"lacks .*model\.embed_tokens\.steps_weight"),
        (_drop("model.embed_tokens.weight"), r"lacks .*model\.embed_tokens\.weight"),
        (_shorten("model.embed_tokens.weight"), r"model\.embed_tokens\.weight is \[499"),
        (_flip, r"codes of model\.embed_tokens have the checksum"),
    ],
    ids=["no steps", "no codes", "a row less", "a bit flipped"],
)
def test_what_does_not_fit_is_refused_by_name(folders, tmp_path, change, said, capfd):
    shutil.copytree(folders("llama, tied"), tmp_path / "broken")
    spoil(tmp_path / "broken", change)
    check_refusal(tmp_path / "broken", said, capfd)


def check_refusal(folder: Path, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    """vLLM does not start, and its log says why."""
    with pytest.raises(RuntimeError, match="initialization failed"), served(folder):
        pass
    log = "".join(capfd.readouterr())
    assert re.search(rf"CheckpointError: .*{said}", log), log[-3000:]


def test_a_missing_dense_table_is_refused_by_name(folders, tmp_path, capfd):
    """vLLM itself checks this of models only that nothing quantises."""
    shutil.copytree(folders("llama, head alone"), tmp_path / "broken")
    spoil(tmp_path / "broken", _drop("model.embed_tokens.weight"))
    check_refusal(tmp_path / "broken", r"lacks model\.embed_tokens\.weight", capfd)


def test_dense_models_are_left_alone(tmp_path):
    """With the plugin there, and registered once more, a dense model is of vLLM's own classes."""
    from hf_dirembed.integrations.vllm import register

    torch.manual_seed(0)
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    register()
    expected = tokens_of_transformers(tmp_path)
    with served(tmp_path) as engine:
        assert tokens_of(engine) == expected
        (found,) = engine.apply_model(_kind_of_embedding)
    assert tuple(found) == ("vllm.model_executor.models.llama", "UnquantizedEmbeddingMethod")


def _kind_of_embedding(model: nn.Module) -> tuple[str, str]:
    return type(model).__init__.__module__, type(model.get_submodule("model.embed_tokens").quant_method).__name__


def with_metadata() -> dict[str, str]:
    """The environment of `vllm`, which asks for a package of this name and its build; vllm-cpu is called otherwise."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        folder = Path(tempfile.mkdtemp())
        named = folder / f"vllm-{vllm.__version__}+cpu.dist-info"
        named.mkdir()
        (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm.__version__}+cpu\n")
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(folder)]))
        return {**os.environ, "PYTHONPATH": path}
    return dict(os.environ)


def test_the_server_answers_an_openai_client(folders, tmp_path):
    from openai import OpenAI

    shutil.copytree(folders("llama, tied"), tmp_path / "model")
    tokenizer_of_words(VOCAB).save_pretrained(tmp_path / "model")
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(tmp_path / "model"), "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "4"]
    with server(command, tmp_path / "log", with_metadata()) as address:
        client = OpenAI(base_url=address, api_key="none")
        (model,) = client.models.list().data
        for ids, expected in zip(PROMPTS, tokens_of_transformers(tmp_path / "model"), strict=True):
            prompt = " ".join(map(word, ids))
            answer = client.completions.create(
                model=model.id, prompt=prompt, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
            )
            assert [int(word.removeprefix("w")) for word in answer.choices[0].text.split()] == expected
