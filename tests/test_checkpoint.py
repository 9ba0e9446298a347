"""Folders and the command line: what is written, what is refused, and how."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from families import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast, pipeline

import hf_dirembed
from hf_dirembed.checkpoints.convert import compress_checkpoint, inspect_checkpoint, load_model, load_tokenizer
from hf_dirembed.cli.commands import main


GOLDEN = Path(__file__).parent / "golden" / "config.json"
TABLE = "bert.embeddings.word_embeddings"


@pytest.fixture
def dense(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "dense"
    FAMILIES["bert"].make("AutoModelForMaskedLM").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlanguage: en\n---\n")
    (folder / "pytorch_model.bin").write_text("not to be carried over")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_compress_inspect_expand(dense: Path, tmp_path: Path) -> None:
    out, stock = tmp_path / "out", tmp_path / "stock"
    done = run("compress", dense, out, "--method", "direction", "--ratio", 3, "--json")
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)

    # The figures are those of the file.
    tensors = load_file(out / "model.safetensors")
    table = {name: t for name, t in tensors.items() if name.startswith(f"{TABLE}.")}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in table.values())
    assert summary["bytes"] == num_bytes
    assert summary["dense_bytes"] == 160 * 32 * 4
    whole, of_source = (
        sum(tensor.numel() * tensor.element_size() for tensor in load_file(folder / "model.safetensors").values())
        for folder in (out, dense)
    )
    assert (summary["model_bytes"], summary["dense_model_bytes"]) == (whole, of_source)
    assert summary["ratio"] == pytest.approx(summary["dense_bytes"] / num_bytes)
    assert summary["ratio"] >= 3
    assert summary["bits_per_weight"] == pytest.approx(8 * num_bytes / (160 * 32))
    assert json.loads(run("inspect", out, "--json").stdout) == summary
    assert f"{summary['bits_per_weight']:.3f}" in run("inspect", out).stdout

    before = AutoModelForMaskedLM.from_pretrained(dense).get_input_embeddings().weight
    after = AutoModelForMaskedLM.from_pretrained(out).get_input_embeddings().dense_weight()
    directed = before.norm(dim=1) > 0  # the padding row of a fresh BERT is zero
    cosine = torch.nn.functional.cosine_similarity(before, after)[directed].mean()
    (table_summary,) = summary["tables"]
    assert (table_summary["name"], table_summary["bytes"]) == (TABLE, num_bytes)
    assert table_summary["mean_cosine"] == pytest.approx(cosine.item(), abs=1e-5)

    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert names == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json",
        "adapters_dirembed.py", "checks_dirembed.py", "codes_dirembed.py", "configuration_dirembed.py",
        "guarded_dirembed.py", "kernels_dirembed.py", "kinds_dirembed.py", "matrix_dirembed.py",
        "modeling_dirembed.py", "modules_dirembed.py", "placement_dirembed.py", "products_dirembed.py",
        "resizing_dirembed.py", "stock_dirembed.py", "tables_dirembed.py", "triton_dirembed.py", "README.md",
    }  # fmt: skip

    assert run("expand", out, stock).exit_code == 0
    assert not list(stock.glob("*.py"))
    plain = transformers.BertForMaskedLM.from_pretrained(stock)
    torch.testing.assert_close(plain.get_input_embeddings().weight.data, after)
    card = (stock / "README.md").read_text()
    assert f"| `{TABLE}` | 160 x 32 | {summary['bits_per_weight']:.2f} bits per weight" in card


def test_config_on_disk_is_golden(tmp_path: Path) -> None:
    """The file format: a change of it is a decision, not an accident."""
    model = hf_dirembed.compress(FAMILIES["bert"].make("AutoModelForMaskedLM"), method="direction", rank=5)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    record = config["dirembed"]["record"]["tables"][TABLE]
    config["transformers_version"] = record["settings"]["versions"] = "(varies)"
    for name in ("mean_cosine", "distortion", "bound_bits"):
        assert 0 < record["quality"].pop(name) < 4
    for name in ("checksum", "decoder_checksum"):
        assert re.fullmatch("crc32:[0-9a-f]{8}", record.pop(name))
    assert config == json.loads(GOLDEN.read_text())


def test_loading_with_the_class_it_was_saved_in_warns_of_nothing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress_checkpoint(dense, tmp_path / "out", method="svd", rank=4)
    warnings: list[object] = []
    monkeypatch.setattr("transformers.configuration_utils.logger.warning", lambda *message: warnings.append(message))
    assert type(load_model(tmp_path / "out")).__name__ == "DirEmbedBertForMaskedLM"
    assert warnings == []


def test_a_tokenizer_of_which_a_part_is_missing_is_refused(dense: Path, tmp_path: Path) -> None:
    FAMILIES["marian"].make("AutoModel").save_pretrained(tmp_path)
    shutil.copy(dense / "tokenizer.json", tmp_path)  # Marian's needs other files
    with pytest.raises(hf_dirembed.CheckpointError, match="does not load"):
        load_tokenizer(tmp_path)


def forge(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def relaid(**values: Any) -> Callable[[Path], None]:
    return forge(lambda c: c["dirembed"]["tables"][TABLE].update(values))


def drop(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[f"{TABLE}.{name}"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


BROKEN = {
    "no spec": (forge(lambda c: c.pop("dirembed")), hf_dirembed.SpecError),
    "a list for a spec": (forge(lambda c: c.update(dirembed=[])), hf_dirembed.SpecError),
    "unknown key": (forge(lambda c: c["dirembed"].update(extra=1)), hf_dirembed.SpecError),
    "unknown key of a layout": (relaid(extra=1), hf_dirembed.SpecError),
    "no tables": (forge(lambda c: c["dirembed"].update(tables={})), hf_dirembed.SpecError),
    "a list for a layout": (forge(lambda c: c["dirembed"]["tables"].update({TABLE: []})), hf_dirembed.SpecError),
    "older format": (forge(lambda c: c["dirembed"].update(format=1)), hf_dirembed.SpecError),
    "newer format": (forge(lambda c: c["dirembed"].update(format=3)), hf_dirembed.SpecError),
    "rank 0": (relaid(rank=0), hf_dirembed.SpecError),
    "rank true": (relaid(rank=True), hf_dirembed.SpecError),
    "another rank": (relaid(rank=7), hf_dirembed.CheckpointError),
    "as wide as the table": (relaid(rank=32), hf_dirembed.SpecError),
    "wider than the table": (relaid(rank=9999), hf_dirembed.SpecError),
    "unknown base": (forge(lambda c: c["dirembed"].update(base_model_type="../x")), hf_dirembed.SpecError),
    "itself as base": (forge(lambda c: c["dirembed"].update(base_model_type="dirembed")), hf_dirembed.SpecError),
    "no codes": (drop("weight"), hf_dirembed.CheckpointError),
    "no decoder": (drop("decoder_weight"), hf_dirembed.CheckpointError),
    "no bias": (drop("decoder_bias_weight"), hf_dirembed.CheckpointError),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused(name: str, tmp_path: Path) -> None:
    spoil, error = BROKEN[name]
    hf_dirembed.compress(FAMILIES["bert"].make("AutoModelForMaskedLM"), method="direction", rank=5).save_pretrained(
        tmp_path
    )
    spoil(tmp_path)
    with pytest.raises(error):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_format_1_is_said_to_have_never_been_published(tmp_path: Path) -> None:
    hf_dirembed.compress(FAMILIES["bert"].make("AutoModel"), method="svd", rank=5).save_pretrained(tmp_path)
    flat = {"method": "svd", "rank": 5, "codes": "float32", "decoder": "float32", "base_model_type": "bert"}
    forge(lambda c: c.update(dirembed={**flat, "format": 1, "settings": {}, "figures": {}}))(tmp_path)
    for load in (transformers.AutoModel, transformers.BertModel):
        with pytest.raises(hf_dirembed.SpecError, match="format 1, which was never published: compress it again"):
            load.from_pretrained(tmp_path)
    done = run("inspect", tmp_path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "never published" in done.stderr


@pytest.mark.parametrize("method", ["transform", "direction"])
@pytest.mark.parametrize("loader", [AutoModelForMaskedLM, transformers.BertForMaskedLM], ids=["auto", "stock"])
def test_codes_that_something_changed_are_noticed(method: str, loader: Any, tmp_path: Path) -> None:
    """One bit of the codes is enough; a decoder may learn, so it is not part of the checksum."""
    budget = {"bits": 6} if method == "transform" else {"rank": 5}
    hf_dirembed.compress(FAMILIES["bert"].make("AutoModelForMaskedLM"), method=method, **budget).save_pretrained(
        tmp_path
    )
    intact = load_file(tmp_path / "model.safetensors")
    names = [name.removeprefix(f"{TABLE}.") for name in intact if name.startswith(f"{TABLE}.")]
    for name in names:
        tensors = {key: tensor.clone() for key, tensor in intact.items()}
        tensors[f"{TABLE}.{name}"].view(torch.uint8).view(-1)[0] ^= 1
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        if name in ("decoder_weight", "decoder_bias_weight", "outlier_weight"):
            loader.from_pretrained(tmp_path)
            continue
        expected = f"codes of {TABLE} have the checksum .* changed"
        if name in ("latents_weight", "row_weight", "class_counts_weight", "outlier_rows_weight"):
            expected += "|packed codes|does not name"  # what fits the layout no more is said before
        with pytest.raises(hf_dirembed.CheckpointError, match=expected):
            loader.from_pretrained(tmp_path)
    forge(lambda c: c["dirembed"]["record"]["tables"][TABLE].pop("checksum"))(tmp_path)
    loader.from_pretrained(tmp_path)  # nobody has said what they were


@pytest.mark.parametrize("method", ["transform", "direction"])
def test_any_dtype_may_be_loaded(method: str, tmp_path: Path) -> None:
    """The model's own, a wider and a narrower one; outliers and float codes are in it too."""
    dense = FAMILIES["bert"].make("AutoModelForMaskedLM").bfloat16()
    with torch.no_grad():
        dense.get_input_embeddings().weight[5] *= 1e5  # an outlier
    budget = {"bits": 6} if method == "transform" else {"rank": 5}
    model = hf_dirembed.compress(dense, method=method, **budget)
    assert (model.get_input_embeddings().layout.outliers == 1) == (method == "transform")
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=dtype)
        again = loaded.get_input_embeddings().weight
        assert loaded.dtype == dtype
        assert torch.equal(again.float(), model.get_input_embeddings().weight.to(again.dtype).float())


def test_a_checksum_follows_codes_that_were_trained(tmp_path: Path) -> None:
    model = hf_dirembed.compress(FAMILIES["bert"].make("AutoModelForMaskedLM"), method="direction", rank=5)
    checksums = []
    for number in range(2):
        model.save_pretrained(tmp_path / str(number))
        checksums.append(model.config.dirembed["record"]["tables"][TABLE]["checksum"])
        again = AutoModelForMaskedLM.from_pretrained(tmp_path / str(number))
        assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
        with torch.no_grad():
            model.unfreeze_codes().get_input_embeddings().weight += 1
    assert checksums[0] != checksums[1]


def test_other_formats_are_refused(tmp_path: Path) -> None:
    hf_dirembed.compress(FAMILIES["bert"].make("AutoModel"), method="direction", rank=5).save_pretrained(tmp_path)
    with pytest.raises(hf_dirembed.CheckpointError, match="safetensors"):
        transformers.AutoModel.from_pretrained(tmp_path, use_safetensors=False)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_bits_of_each_table(tmp_path: Path) -> None:
    """Those that are named have what was asked for, within the bytes of a row; another stays dense."""
    FAMILIES["llama-untied"].make("AutoModelForCausalLM").save_pretrained(tmp_path / "dense")
    done = run("compress", tmp_path / "dense", tmp_path / "both", "--bits", "embed_tokens=6, lm_head=9", "--json")
    assert done.exit_code == 0, done.stderr
    both = {table["name"]: table["bits_per_weight"] for table in json.loads(done.stdout)["tables"]}
    assert both.keys() == {"model.embed_tokens", "lm_head"}
    assert 5 < both["model.embed_tokens"] <= 6 < 8 < both["lm_head"] <= 9

    done = run("compress", tmp_path / "dense", tmp_path / "one", "--bits", "lm_head=9", "--json")
    assert [table["name"] for table in json.loads(done.stdout)["dense_tables"]] == ["model.embed_tokens"]


MISTAKES = {
    "no such model": (["compress", "{tmp}/nowhere", "{out}", "--bits", "4"], "nowhere"),
    "not a model": (["compress", "{tmp}", "{out}", "--bits", "4"], "config.json"),
    "no budget": (["compress", "{dense}", "{out}"], "exactly one of bits, ratio and rank"),
    "two budgets": (["compress", "{dense}", "{out}", "--bits", "4", "--rank", "3"], "bits=4.0, rank=3"),
    "too small a budget": (["compress", "{dense}", "{out}", "--bits", "0.01"], "at least bits="),
    "negative budget": (["compress", "{dense}", "{out}", "--bits", "-1"], "bits=-1.0"),
    "infinite budget": (["compress", "{dense}", "{out}", "--ratio", "inf"], "ratio=inf"),
    "rank too large": (["compress", "{dense}", "{out}", "--rank", "32"], "32"),
    "rank 0": (["compress", "{dense}", "{out}", "--rank", "0"], "rank=0"),
    "unknown method": (["compress", "{dense}", "{out}", "--bits", "4", "--method", "magic"], "magic"),
    "unknown dtype": (["compress", "{dense}", "{out}", "--bits", "4", "--latent-dtype", "int8"], "int8"),
    "unknown language": (["compress", "{dense}", "{out}", "--bits", "4", "--languages", "klingon"], "klingon"),
    "output exists": (["compress", "{dense}", "{dense}", "--bits", "4"], "exists already"),
    "output below a file": (["compress", "{dense}", "{dense}/config.json/out", "--bits", "4"], "cannot be written"),
    "no number": (["compress", "{dense}", "{out}", "--bits", "two"], "embed_tokens=2,lm_head=4"),
    "no number of a table": (
        ["compress", "{dense}", "{out}", "--bits", "word_embeddings="],
        "embed_tokens=2,lm_head=4",
    ),
    "bits of a table twice": (
        ["compress", "{dense}", "{out}", "--bits", "word_embeddings=2,word_embeddings=3"],
        "names a table twice: give each one number",
    ),
    "no ratio": (["compress", "{dense}", "{out}", "--ratio", "0"], "give one, like ratio=16"),
    "no rank": (["compress", "{dense}", "{out}", "--method", "svd", "--rank", "0"], "give one, like rank=64"),
    "bits of no such table": (["compress", "{dense}", "{out}", "--bits", "lm_hat=4"], "'lm_hat' names no table"),
    "no such table": (
        ["compress", "{dense}", "{out}", "--bits", "4", "--tables", "lm_hat"],
        "'lm_hat' names no table",
    ),
    "expand a dense model": (["expand", "{dense}", "{out}"], "dense is not a compressed checkpoint: there is nothing"),
    "a card of a dense model": (["card", "{dense}"], "not a compressed checkpoint"),
    "no Hub id": (["compress", "{dense}", "{out}", "--bits", "4", "--base-model", "../x"], "no id of the Hub"),
    "no such folder": (["inspect", "{tmp}/nowhere"], "nowhere is no folder here, and no id of the Hub: check"),
    "private what": (["compress", "{dense}", "{out}", "--bits", "4", "--private"], "--private is for an upload"),
    "an upload to no Hub id": (
        ["compress", "{dense}", "{out}", "--bits", "4", "--push-to-hub", "no id!"],
        "--push-to-hub 'no id!' is no id of the Hub: give one like org/name",
    ),
    "a seed of nothing": (
        ["compress", "{dense}", "{out}", "--rank", "3", "--method", "svd", "--seed", "1"],
        "no random",
    ),
    "no budget but a word": (["compress", "{dense}", "{out}", "--bits", "x"], "'x' is neither a number nor"),
    "no output": (["compress", "{dense}"], "Missing argument 'OUT'. ("),
    "no such option": (["compress", "{dense}", "{out}", "--bit", "4"], "No such option '--bit'"),
    "no such command": (["kompress", "{dense}", "{out}"], "No such command 'kompress'"),
    "an option before the command": (["--bits", "4", "compress"], "No such option '--bits'"),
    "no such text": (["compress", "{dense}", "{out}", "--bits", "4", "--calibrate", "{tmp}/no.txt"], "cannot read"),
    "a card of nothing": (["card", "{tmp}/nowhere"], "is no folder"),
    "no token embedding": (["compress", "{vit}", "{out}", "--bits", "4"], "no token embedding"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_that_names_the_mend(name: str, dense: Path, tmp_path: Path) -> None:
    arguments, expected = MISTAKES[name]
    out, vit = tmp_path / "out", tmp_path / "vit"
    if "{vit}" in arguments:
        config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        transformers.ViTModel(config).save_pretrained(vit)
    before = sorted(tmp_path.rglob("*"))
    done = run(*(argument.format(tmp=tmp_path, out=out, dense=dense, vit=vit) for argument in arguments))
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("hf-dirembed: ")
    assert expected in line
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"


def test_help_says_what_every_command_does() -> None:
    for name in main.commands:
        done = run(name, "--help")
        assert done.exit_code == 0, done.exception
        assert done.stdout.startswith("Usage:")
    assert "--bits BITS" in run("compress", "--help").stdout
    done = run("--help")
    assert done.exit_code == 0
    commands = done.stdout.partition("Commands:")[2].strip().splitlines()
    assert [line.split()[0] for line in commands] == sorted(main.commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)


def test_resume_keeps_what_was_calibrated_or_trained(dense: Path, tmp_path: Path) -> None:
    text, calibrated, trained = tmp_path / "text.txt", tmp_path / "statistics", tmp_path / "training"
    text.write_text("the cat sat on the mat\n" * 50)
    for number, bits in enumerate((5, 6)):  # calibrated once, used for every budget
        done = run(
            "compress", dense, tmp_path / f"c{number}", "--bits", bits, "--calibrate", text, "--resume", calibrated
        )
        assert done.exit_code == 0, done.stderr
    for number in range(2):
        options = ("--method", "autoencoder", "--rank", 6, "--resume", trained)
        assert run("compress", dense, tmp_path / f"a{number}", *options).exit_code == 0
    refused = {
        ("--method", "autoencoder", "--rank", "5", "--resume", trained): "was trained with rank=6",
        ("--method", "autoencoder", "--rank", "6", "--resume", calibrated): "holds no dirembed-autoencoder-2",
        ("--bits", "5", "--calibrate", text, "--resume", trained): "holds no dirembed-statistics-3",
        ("--bits", "5", "--resume", trained): "resume goes with calibration on text and with method 'autoencoder'",
        ("--method", "svd", "--rank", "5", "--resume", trained): "resume goes with calibration",
    }
    for options, message in refused.items():
        done = run("compress", dense, tmp_path / "refused", *options)
        assert (done.exit_code, done.stdout) == (2, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "refused").exists()


def test_compressing_twice_is_refused(dense: Path, tmp_path: Path) -> None:
    compress_checkpoint(dense, tmp_path / "one", method="svd", rank=4)
    done = run("compress", tmp_path / "one", tmp_path / "two", "--method", "svd", "--rank", 3)
    assert done.exit_code == 2
    assert "compressed already" in done.stderr
    assert not (tmp_path / "two").exists()


def test_an_interrupt_leaves_nothing(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.BertForMaskedLM, "save_pretrained", interrupt)
    before = sorted(tmp_path.rglob("*"))
    done = run("compress", dense, tmp_path / "out", "--method", "svd", "--rank", 4)
    assert done.exit_code == 130
    assert done.stderr.strip() == "hf-dirembed: interrupted"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("task", ["fill-mask", "feature-extraction", "text-classification", "token-classification"])
def test_pipelines_of_an_encoder(task: str, dense: Path, tmp_path: Path) -> None:
    compress_checkpoint(dense, tmp_path / "out", method="direction", rank=8)
    pipe = pipeline(task, model=str(tmp_path / "out"))
    expanded = hf_dirembed.expand(copy.deepcopy(pipe.model))
    text = "the cat sat on the [MASK] ." if task == "fill-mask" else "the cat sat on the mat ."
    found, expected = pipe(text), pipeline(task, model=expanded, tokenizer=pipe.tokenizer)(text)
    assert_alike(found, expected)


def test_text_generation(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = hf_dirembed.compress(FAMILIES["llama-tied"].make("AutoModelForCausalLM"), method="direction", rank=9)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False}
    found = pipeline("text-generation", model=str(tmp_path))("the cat sat", **options)
    expected = pipeline("text-generation", model=hf_dirembed.expand(model), tokenizer=copy.deepcopy(tokenizer))(
        "the cat sat", **options
    )
    assert found == expected


def assert_alike(found: Any, expected: Any) -> None:
    """Equal, but for the last bits of floats."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_alike(found[key], expected[key])
    else:
        assert found == (pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else expected)


def test_inspect_reads_shards(tmp_path: Path) -> None:
    model = hf_dirembed.compress(FAMILIES["bert"].make("AutoModel"), method="svd", rank=4)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert inspect_checkpoint(tmp_path / "shards") == inspect_checkpoint(tmp_path / "whole")


def test_inspect_states_how_many_rows_have_how_many_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**FAMILIES["bert"].arguments, "vocab_size": 2000})
    weights = (torch.arange(2000.0) + 1) ** -1.25  # uneven, so that frequent rows get more bits
    model = hf_dirembed.compress(transformers.BertForMaskedLM(config).eval(), bits=2, token_weights=weights)
    model.save_pretrained(tmp_path)
    summary = inspect_checkpoint(tmp_path)
    (table,) = summary.tables
    embedding = model.get_input_embeddings()
    classes = embedding.row_classes()
    assert [each.rows for each in table.classes] == classes.bincount().tolist()
    assert len(table.classes) > 1
    bits = [each.bits_per_weight for each in table.classes]
    assert bits == sorted(bits)
    of_rows = sum(each.rows * each.bits_per_weight for each in table.classes) * 32 / 8
    assert of_rows == embedding.weight.nbytes + embedding.further_weight.nbytes
    assert table.code_bytes + table.decoder_bytes == table.bytes == summary.bytes
    codes = f"rank={table.rank}, classes={len(table.classes)}"
    assert repr(embedding) == f"CompressedEmbedding(2000, 32, method=transform, {codes}, bits_per_weight=2)"
    assert table.decoder_bytes == embedding.stored_decoder().nbytes + embedding.decoder_bias_weight.nbytes
    shown = run("inspect", tmp_path).stdout
    assert f"{bits[0]:.3f} per weight in the codes of {table.classes[0].rows:,}" in shown
    assert f"needs at least {table.bound_bits:.3f} bits per weight for that" in shown


def test_print_compression(capsys: pytest.CaptureFixture[str]) -> None:
    """A line for every vocabulary table, dense ones too."""
    model = hf_dirembed.compress(FAMILIES["bert"].make("AutoModel"), method="svd", rank=4)
    model.print_compression()
    embedding = model.get_input_embeddings()
    size = f"{embedding.num_bytes:,} bytes, {160 * 32 * 4 / embedding.num_bytes:.1f}x smaller than dense"
    bits = f"{embedding.bits_per_weight:.2f} bits per weight (svd)"
    assert capsys.readouterr().out == f"embeddings.word_embeddings  160 x 32, {size}, {bits}\n"
    model.set_input_embeddings(torch.nn.Embedding(10, 32))
    model.print_compression()
    assert capsys.readouterr().out == "embeddings.word_embeddings  10 x 32, 1,280 bytes, dense\n"
    options = {"method": "svd", "rank": 4}
    hf_dirembed.compress(
        FAMILIES["llama-untied"].make("AutoModelForCausalLM"), tables=["lm_head"], **options
    ).print_compression()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["lm_head", "model.embed_tokens"]
    assert lines[1] == "model.embed_tokens  160 x 32, 20,480 bytes, dense"
    hf_dirembed.compress(FAMILIES["llama-tied"].make("AutoModelForCausalLM"), **options).print_compression()
    assert capsys.readouterr().out.splitlines()[1] == "lm_head  160 x 32, shares model.embed_tokens"


def test_inspect_shows_tables_that_are_dense(tmp_path: Path) -> None:
    dense = FAMILIES["llama-untied"].make("AutoModelForCausalLM")
    dense.save_pretrained(tmp_path / "dense")
    summary = inspect_checkpoint(tmp_path / "dense")
    assert (summary.base_model_type, summary.tables, summary.bytes, summary.ratio) == ("llama", (), 0, 1)
    found = [(table.name, table.kind, table.num_bytes) for table in summary.dense_tables]
    assert found == [("model.embed_tokens", "input", 160 * 32 * 4), ("lm_head", "head", 160 * 32 * 4)]
    shown = run("inspect", tmp_path / "dense").stdout
    assert all(f"{name}, 160 x 32: 20.5 kB, dense" in shown for name, _, _ in found)

    hf_dirembed.compress(dense, method="svd", rank=4, tables=["lm_head"]).save_pretrained(tmp_path / "head")
    summary = inspect_checkpoint(tmp_path / "head")
    assert [table.name for table in summary.tables] == ["lm_head"]
    assert [table.name for table in summary.dense_tables] == ["model.embed_tokens"]
    assert summary.bytes == summary.tables[0].bytes == dense.lm_head.num_bytes
    assert json.loads(run("inspect", tmp_path / "head", "--json").stdout)["dense_tables"][0]["kind"] == "input"


@pytest.mark.parametrize("figure", ["much", float("nan"), True, [1.0], None])
def test_figures_that_are_none_are_left_out(figure: Any, tmp_path: Path) -> None:
    model = hf_dirembed.compress(FAMILIES["bert"].make("AutoModel"), method="svd", rank=4)
    model.save_pretrained(tmp_path)
    path = "embeddings.word_embeddings"
    names = ("dense_bytes", "mean_cosine", "token_cosine", "distortion", "bound_bits")
    forge(lambda config: config["dirembed"]["record"]["tables"][path]["quality"].update(dict.fromkeys(names, figure)))(
        tmp_path
    )
    (summary,) = inspect_checkpoint(tmp_path).tables
    assert [getattr(summary, name) for name in names] == [160 * 32 * 4, None, None, None, None]
    assert run("inspect", tmp_path).exit_code == 0
