"""Commands of others that take a compressed folder, or an expanded one; run by `tests/engines/commands.sh`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from words import server, tokenizer_of_words, word

import hf_dirembed


pytestmark = pytest.mark.commands
lm_eval = pytest.importorskip("lm_eval", reason="not installed: tests/engines/commands.sh makes an environment for it")

VOCAB, PROMPT = 320, [5, 17, 300, 42]
BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("compressed")
    hf_dirembed.compress(transformers.LlamaForCausalLM(config).eval(), bits=3).save_pretrained(folder)
    tokenizer = tokenizer_of_words(VOCAB)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expanded(compressed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expanded") / "model"
    subprocess.run([str(BIN / "hf-dirembed"), "expand", str(compressed), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def expected(compressed: Path) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(compressed)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    return model.generate(torch.tensor([PROMPT]), **settings)[0, len(PROMPT) :].tolist()


TASK = """
task: own_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}]
"""


def test_lm_eval_on_text_of_ones_own(compressed: Path, expanded: Path, tmp_path: Path) -> None:
    """The compressed model is as perplexed as the one that it expands to, and the command is that of the docs."""
    words = torch.randint(3, VOCAB, (4, 40), generator=torch.Generator().manual_seed(0))
    lines = [json.dumps({"text": " ".join(map(word, line))}) for line in words.tolist()]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "own_text.yaml").write_text(TASK.format(file=tmp_path / "text.jsonl"))
    found = []
    for model, trust in ((compressed, ",trust_remote_code=True"), (expanded, "")):
        command = [str(BIN / "lm_eval"), "--model", "hf", "--model_args", f"pretrained={model},dtype=float32{trust}"]
        command += ["--tasks", "own_text", "--include_path", str(tmp_path), "--device", "cpu"]
        command += ["--output_path", str(tmp_path / "results" / model.name)]
        subprocess.run(command, check=True, env=ENVIRONMENT)
        (file,) = (tmp_path / "results" / model.name).rglob("results_*.json")
        found.append(json.loads(file.read_text())["results"]["own_text"]["byte_perplexity,none"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] > 1.5


def test_transformers_serve_takes_an_expanded_folder(expanded: Path, expected: list[int], tmp_path: Path) -> None:
    """It knows the classes of transformers itself alone, and takes no compressed folder."""
    from openai import OpenAI

    command = [str(BIN / "transformers"), "serve", str(expanded), "--device", "cpu"]
    with server([*command, "--dtype", "float32"], tmp_path / "log", ENVIRONMENT) as address:
        client = OpenAI(base_url=address, api_key="none")
        messages: Any = [{"role": "user", "content": " ".join(map(word, PROMPT))}]
        answer = client.chat.completions.create(
            model=str(expanded), messages=messages, max_tokens=len(expected), temperature=0
        )
    end = expected.index(2) if 2 in expected else len(expected)
    words = [word(each) for each in expected[:end] if each]
    assert answer.choices[0].message.content.split() == words


def test_mlx_takes_an_expanded_folder(expanded: Path, expected: list[int]) -> None:
    pytest.importorskip("mlx_lm", reason="there is no MLX for this machine")
    code = f"""
import mlx.core as mx, mlx_lm
model, _ = mlx_lm.load({str(expanded)!r})
ids = {PROMPT}
for _ in range({len(expected)}):
    ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
print(ids[{len(PROMPT)}:])
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert json.loads(done.stdout.splitlines()[-1]) == expected
