"""A compressed checkpoint with every kind of tensor, and ways to spoil it: its config, its tensors, its files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from packed import convert_input
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from hf_dirembed import TableLayout
from hf_dirembed.remote.codes_dirembed import CODE_TENSORS, RowClass
from hf_dirembed.remote.matrix_dirembed import CompressedMatrix


PATH = "bert.embeddings.word_embeddings"
TABLE = f"{PATH}."
SHARD = "model-00002-of-00003.safetensors"
HUGE = 10**12
LEAST_BYTES = 1 << 22  # what memory is measured against where a file has fewer, or is gone
Spoil = Callable[[Path], Any]


def save_intact(folder: Path) -> None:
    """Saves a small compressed BERT with every kind of tensor, its body large enough to measure against: 9 MB.

    Its config has no checksum of the codes.
    """
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 1 << 15}
    model = BertForMaskedLM(BertConfig(vocab_size=3000, **shape))
    layout = TableLayout(
        method="transform",
        rank=16,
        codes="packed",
        codebook="own",
        decoder="float16",
        bias=True,
        classes=(RowClass((4, 4, 4, 4)), RowClass((8, 4, 4, 4), rows=100)),
        outliers=3,
    )
    convert_input(model, layout, CompressedMatrix(3000, 32, layout).code_tensors()).save_pretrained(folder)
    record(lambda r: r.pop("checksum"))(folder)  # so that what has changed is found by what it breaks


def weight_bytes(folder: Path) -> int:
    """Of a checkpoint's safetensors, those that a spoiled index points to outside of its folder included."""
    return max(LEAST_BYTES, sum(file.stat().st_size for file in folder.parent.rglob("*.safetensors")))


def config(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Changes `config.json`."""

    def apply(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        change(values)
        (folder / "config.json").write_text(json.dumps(values))

    return apply


def base(**values: Any) -> Spoil:
    return config(lambda c: c.update(values))


def spec(**values: Any) -> Spoil:
    """Changes the whole `dirembed` object."""
    return config(lambda c: c["dirembed"].update(values))


def table(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Changes the layout of the one table."""
    return config(lambda c: change(c["dirembed"]["tables"][PATH]))


def record(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Changes the record of the one table."""
    return config(lambda c: change(c["dirembed"]["record"]["tables"][PATH]))


def layout(**values: Any) -> Spoil:
    return table(lambda t: t.update(values))


def blocks(count: int, **values: Any) -> Spoil:
    """Takes the one table for several blocks of columns."""
    return config(
        lambda c: c["dirembed"]["tables"].update({PATH: {"blocks": [c["dirembed"]["tables"][PATH]] * count, **values}})
    )


def row_class(number: int, **values: Any) -> Spoil:
    """Changes one of the two classes of rows."""
    return table(lambda t: t["classes"][number].update(values))


def classes(change: Callable[[list[Any]], Any]) -> Spoil:
    return table(lambda t: change(t["classes"]))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Changes the tensors of `model.safetensors`."""

    def apply(folder: Path) -> None:
        held = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(held)
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, folder / "model.safetensors")

    return apply


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return tensors(lambda held: held.update({TABLE + name: change(held[TABLE + name])}))


def filled(name: str, value: float, *, at: int = 0) -> Spoil:
    def fill(found: torch.Tensor) -> torch.Tensor:
        found.view(-1)[at] = value
        return found

    return tensor(name, fill)


def header(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Changes the JSON header of `model.safetensors`, whatever follows from it."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        values = json.loads(content[8:end])
        change(values)
        text = json.dumps(values).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return apply


def content(change: Callable[[bytes], bytes], name: str = "model.safetensors") -> Spoil:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def pickled(folder: Path) -> None:
    """A pickle that says so when it is read, in place of the weights."""
    (folder / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "executed",)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))


def pickled_as_safetensors(folder: Path) -> None:
    pickled(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.safetensors")


def sharded(change: Spoil) -> Spoil:
    """In shards, of which `change` gets the folder."""

    def apply(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(held)
        parts = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
        for file, part in parts.items():
            save_file({name: held[name] for name in part}, folder / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        change(folder)

    return apply


def index(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    return sharded(apply)


def outside(folder: Path) -> None:
    """A shard that lies beside the folder, and an index that points there."""
    (folder / SHARD).rename(folder.parent / SHARD)
    file = folder / "model.safetensors.index.json"
    file.write_text(file.read_text().replace(SHARD, f"../{SHARD}"))


SPECS: dict[str, Spoil] = {
    "no spec": config(lambda c: c.pop("dirembed")),
    "a list for a spec": base(dirembed=[]),
    "a string for a spec": base(dirembed="svd"),
    "unknown key of the spec": spec(extra=1),
    "the format that was never published": spec(format=1),
    "newer format": spec(format=3),
    "a format that is true": spec(format=True),
    "no format": config(lambda c: c["dirembed"].pop("format")),
    "no tables": spec(tables={}),
    "a list for tables": spec(tables=[]),
    "tables dropped": config(lambda c: c["dirembed"].pop("tables")),
    "no layout": spec(tables={PATH: None}),
    "a list for a layout": spec(tables={PATH: []}),
    "a string for a layout": spec(tables={PATH: "svd"}),
    "a table that the model lacks": config(
        lambda c: c["dirembed"].update(tables={"bert.nowhere": c["dirembed"]["tables"][PATH]})
    ),
    "a table that is none": config(
        lambda c: c["dirembed"].update(tables={"bert.encoder": c["dirembed"]["tables"][PATH]})
    ),
    "one more table, of positions": config(
        lambda c: c["dirembed"]["tables"].update(
            {"bert.embeddings.position_embeddings": c["dirembed"]["tables"][PATH]}
        )
    ),
    "the tied head once more": config(
        lambda c: c["dirembed"]["tables"].update({"cls.predictions.decoder": c["dirembed"]["tables"][PATH]})
    ),
    "blocks of other columns": blocks(2, dims=[16, 8]),
    "blocks without dims": blocks(1),
    "blocks for a table of one": blocks(1, dims=[32]),
    "fewer blocks than dims": blocks(1, dims=[16, 16]),
    "more blocks than there may be": blocks(5000, dims=[1] * 5000),
    "blocks of fractions": blocks(2, dims=[16.0, 16.0]),
    "no blocks": spec(tables={PATH: {"dims": [], "blocks": []}}),
    "a list for a record": spec(record=[]),
    "a list for records": spec(record={"tables": []}),
    "a list for a table's record": spec(record={"tables": {PATH: []}}),
    "unknown key of a record": record(lambda r: r.update(extra=1)),
    "settings that are no object": record(lambda r: r.update(settings=[1])),
    "quality that is no object": record(lambda r: r.update(quality="good")),
    "a checksum that is a number": record(lambda r: r.update(checksum=7)),
    "another checksum": record(lambda r: r.update(checksum="crc32:00000000")),
    "unknown key": layout(extra=1),
    "missing key": table(lambda t: t.pop("codes")),
    "rank 0": layout(rank=0),
    "negative rank": layout(rank=-4),
    "huge rank": layout(rank=HUGE),
    "rank true": layout(rank=True),
    "rank as text": layout(rank="16"),
    "NaN rank": layout(rank=float("nan")),
    "another rank": layout(rank=7),
    "method of another shape": layout(method="../../x"),
    "no codes": layout(codes=None),
    "codes of no dtype": layout(codes="int8"),
    "decoder of no dtype": layout(decoder="float8"),
    "packed codes without a bias": layout(bias=False),
    "allocation of three widths": row_class(0, bit_allocation=[8, 8, 0]),
    "negative allocation": row_class(0, bit_allocation=[-8, 24, 0, 0]),
    "allocation of another sum": row_class(0, bit_allocation=[0, 5, 8, 9]),
    "allocation of nothing": row_class(0, bit_allocation=[0, 0, 0, 0]),
    "allocation of fractions": row_class(0, bit_allocation=[4.0, 4, 4, 4]),
    "allocation as text": row_class(0, bit_allocation="4444"),
    "huge allocation": row_class(0, bit_allocation=[HUGE, 0, 0, 0]),
    "codes as wide as the table": classes(lambda c: c.__setitem__(slice(None), [{"bit_allocation": [64, 0, 0, 0]}])),
    "codes of another width": row_class(0, bit_allocation=[2, 8, 4, 2]),
    "no classes": layout(classes=[]),
    "classes dropped": table(lambda t: t.pop("classes")),
    "classes as text": layout(classes="all"),
    "a class as a number": classes(lambda c: c.__setitem__(1, 100)),
    "more classes than there may be": classes(lambda c: c.extend([c[1]] * 3)),
    "another class": classes(lambda c: c.append({**c[1], "rows": 0})),
    "a class dropped": classes(lambda c: c.pop()),
    "classes the other way around": classes(lambda c: c.reverse()),
    "a first class of so many rows": row_class(0, rows=2900),
    "a class of no one knows how many rows": classes(lambda c: c[1].pop("rows")),
    "a class of less than no rows": row_class(1, rows=-1),
    "a class of more rows than the table": row_class(1, rows=HUGE),
    "a class of other rows": row_class(1, rows=3),
    "a class of half a row": row_class(1, rows=99.5),
    "a class of unknown keys": row_class(1, extra=1),
    "a class of fewer bytes than the first": row_class(1, bit_allocation=[4, 0, 0, 0]),
    "no outliers": layout(outliers=0),
    "more outliers than rows": layout(outliers=HUGE),
    "another number of outliers": layout(outliers=4),
    "a fraction of an outlier": layout(outliers=2.5),
    "outliers dropped": table(lambda t: t.pop("outliers")),
    "a zero row beyond the table": layout(zero_row=3000),
    "a negative zero row": layout(zero_row=-1),
    "a list of zero rows": layout(zero_row=[0]),
    "no base": config(lambda c: c["dirembed"].pop("base_model_type")),
    "unknown base": spec(base_model_type="../x"),
    "a base with a path": spec(base_model_type="bert/../../etc"),
    "itself as base": spec(base_model_type="dirembed"),
    "a list for a base": spec(base_model_type=["bert"]),
    "another base": spec(base_model_type="gpt2"),
    "a base without text": spec(base_model_type="vit"),
}

BASES: dict[str, Spoil] = {
    "huge vocabulary": base(vocab_size=HUGE),
    "overflowing vocabulary": base(vocab_size=2**70),
    "smaller vocabulary": base(vocab_size=1000),
    "negative vocabulary": base(vocab_size=-1),
    "vocabulary as text": base(vocab_size="many"),
    "NaN vocabulary": base(vocab_size=float("nan")),
    "no vocabulary": base(vocab_size=0),
    "huge width": base(hidden_size=2**30),
    "narrow width": base(hidden_size=4),
    "no heads": base(num_attention_heads=0),
    "huge depth": base(num_hidden_layers=10**7),
    "depth as text": base(num_hidden_layers="two"),
    "unknown activation": base(hidden_act="__import__('os')"),
    "unknown dtype": base(dtype="float7"),
    "an integer dtype": base(dtype="int8"),
    "padding beyond the table": base(pad_token_id=HUGE),
    "weights outside of the folder": base(transformers_weights="../model.safetensors"),
    "weights in a pickle": base(transformers_weights="pytorch_model.bin"),
}

FILES: dict[str, Spoil] = {
    "truncated weights": content(lambda c: c[: len(c) // 2]),
    "empty weights": content(lambda c: b""),
    "weights of zeros": content(lambda c: bytes(len(c))),
    "a header of 2^60 bytes": content(lambda c: (1 << 60).to_bytes(8, "little") + c[8:]),
    "a header that is no JSON": content(lambda c: c[:8] + b"?" + c[9:]),
    "one byte cut off": content(lambda c: c[:-1]),
    "trailing bytes": content(lambda c: c + b"x"),
    "offsets beyond the file": header(lambda h: h[TABLE + "weight"].update(data_offsets=[0, HUGE])),
    "a shape beyond the file": header(lambda h: h[TABLE + "weight"].update(shape=[HUGE, 12])),
    "a dtype that is none": header(lambda h: h[TABLE + "weight"].update(dtype="F7")),
    "signed codes": header(lambda h: h[TABLE + "weight"].update(dtype="I8")),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a pickle": pickled,
    "a pickle that is called safetensors": pickled_as_safetensors,
    "missing shard": sharded(lambda folder: (folder / SHARD).unlink()),
    "truncated shard": sharded(content(lambda c: c[:-9], SHARD)),
    "index that is no JSON": sharded(content(lambda c: c[1:], "model.safetensors.index.json")),
    "index without a map": index(lambda i: i.pop("weight_map")),
    "index of numbers": index(lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], 1))),
    "index that points outside": sharded(outside),
    "index that points to a root": index(lambda i: i["weight_map"].update({TABLE + "weight": "/etc/passwd"})),
    "index that leaves a shard out": index(
        lambda i: i.update(weight_map={name: file for name, file in i["weight_map"].items() if file != SHARD})
    ),
}

TENSORS: dict[str, Spoil] = {
    **{f"no {name}": tensors(lambda held, name=name: held.pop(TABLE + name)) for name in CODE_TENSORS},
    "codes in float": tensor("weight", lambda t: t.float()),
    "codes in int32": tensor("weight", lambda t: t.int()),
    "codes of fewer rows": tensor("weight", lambda t: t[:-1]),
    "codes of fewer bytes": tensor("weight", lambda t: t[:, :-1]),
    "codes in one line": tensor("weight", lambda t: t.flatten()),
    "codebook in float": tensor("codebook_weight", lambda t: t.float()),
    "codebook in uint8": tensor("codebook_weight", lambda t: t.to(torch.uint8)),
    "codebook of fewer levels": tensor("codebook_weight", lambda t: t[:, :16]),
    "codebook of fewer widths": tensor("codebook_weight", lambda t: t[:2]),
    "transposed decoder": tensor("decoder_weight", lambda t: t.T),
    "decoder in integers": tensor("decoder_weight", lambda t: t.to(torch.int8)),
    "decoder of fewer rows": tensor("decoder_weight", lambda t: t[:-1]),
    "NaN in the decoder": filled("decoder_weight", float("nan")),
    "infinity in the decoder": filled("decoder_weight", float("-inf"), at=-1),
    "NaN in the bias": filled("decoder_bias_weight", float("nan")),
    "infinite bias": filled("decoder_bias_weight", float("inf"), at=-1),
    "latents beyond the rank": filled("latents_weight", 16, at=-1),
    "a latent far beyond the rank": filled("latents_weight", 2**31 - 1),
    "negative latent": filled("latents_weight", -1),
    "latents of fewer codes": tensor("latents_weight", lambda t: t[:-1]),
    "latents in int64": tensor("latents_weight", lambda t: t.long()),
    "steps of fewer codes": tensor("steps_weight", lambda t: t[:-1]),
    "steps in uint8": tensor("steps_weight", lambda t: t.to(torch.uint8)),
    "steps in float": tensor("steps_weight", lambda t: t.float()),
    "a class that there is not": filled("row_weight", 0b10, at=-1),
    "a row of the other class": tensor("row_weight", lambda t: t ^ (torch.arange(len(t)) == 1500)),
    "classes of fewer rows": tensor("row_weight", lambda t: t[:-1]),
    "classes in int32": tensor("row_weight", lambda t: t.int()),
    "classes in columns": tensor("row_weight", lambda t: t.unsqueeze(1)),
    "rows counted twice": tensor("class_counts_weight", lambda t: 2 * t),
    "a count beyond the table": filled("class_counts_weight", 2**31 - 1, at=-1),
    "a negative count": filled("class_counts_weight", -1),
    "counts of fewer blocks": tensor("class_counts_weight", lambda t: t[:-1]),
    "counts in int64": tensor("class_counts_weight", lambda t: t.long()),
    "further bytes of fewer rows": tensor("further_weight", lambda t: t[:-1]),
    "further bytes in rows": tensor("further_weight", lambda t: t.view(100, -1)),
    "further bytes in int8": tensor("further_weight", lambda t: t.to(torch.int8)),
    "NaN in an outlier": filled("outlier_weight", float("nan")),
    "infinity in an outlier": filled("outlier_weight", float("inf"), at=-1),
    "outliers in integers": tensor("outlier_weight", lambda t: t.to(torch.int8)),
    "outliers of fewer columns": tensor("outlier_weight", lambda t: t[:, :-1]),
    "outliers beyond the table": filled("outlier_rows_weight", 3000, at=-1),
    "negative outlier": filled("outlier_rows_weight", -1),
    "outliers out of order": tensor("outlier_rows_weight", lambda t: t.flip(0)),
    "an outlier twice": tensor("outlier_rows_weight", lambda t: torch.cat([t[:1], t[:-1]])),
    "a dense table under its own name": tensor("weight", lambda t: torch.zeros(len(t), 32)),
    "another model's weights": tensors(
        lambda held: [held.clear(), held.update({"wte.weight": torch.zeros(5, 5)})],
    ),
}

ATTACKS = {
    f"{kind}: {name}": spoil
    for kind, attacks in {"layout": SPECS, "base": BASES, "file": FILES, "tensor": TENSORS}.items()
    for name, spoil in attacks.items()
}
