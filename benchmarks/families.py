"""Which architectures work: every language model that transformers has, tiny and random, compressed and reloaded.

    python benchmarks/families.py [--only bert gpt2] [--out docs/families.md]

For each class of the causal, masked, sequence-to-sequence and multimodal mappings, those that read text alone, too: a
tiny config, made by shrinking the sizes of the default one by their names; the stock model, which must run and survive
its own save and reload, or it counts as one that cannot be built; the compressed model, which must have no dense
vocabulary table left, the same tensors after a save and a reload, bit for bit, and answer the same up to rounding:
BLAS sums otherwise where a tensor of a file starts off a cache line. So must it after it is expanded.
"""

from __future__ import annotations

import argparse
import re
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

import hf_dirembed
from hf_dirembed.remote.codes_dirembed import BlocksLayout


TASKS = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForMultimodalLM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
}
VOCAB = 160
MAX_PARAMETERS = 60_000_000
SECONDS = 60  # for one class
# What a size is shrunk to, by its name; the first pattern that matches counts.
SIZES = (
    (r"(^|_)vocab_size$|^(src|tgt)_vocab_size$|vocab_size_per_layer_input|hash_byte_group_vocab$", VOCAB),
    (r"_(token_)?(id|index)$", 4),
    (r"experts_per_tok(en)?$|^(moe_)?(top_k|topk|num_selected_experts)$|^moe_k$", 2),
    (r"^n_groups?$|^topk_group$|^first_k_dense_replace$|^num_nextn_predict_layers$", 1),
    (r"(num|n)_.*experts$|^num_experts$|^n_experts$", 4),
    (r"(^|_)(n_layers?|num_layers|num_hidden_layers|layers|num_blocks|depth|num_layers_per_stack)$", 2),
    (r"key_value_heads$|kv_heads$|^num_kv_heads$", 2),
    (r"(^|_)(n_heads?|num_heads|attention_heads|num_attention_heads|num_key_heads|num_value_heads)$", 4),
    (r"head_dim$|^d_kv$|^dim_head$|^d_head$|^kv_channels$|^rotary_dim$", 16),
    (r"(lora|low|lru|embedding|laurel|dt)_?(_rank|rank|_width)$|_lowrank$", 16),
    (r"max_.*position|position.*embeddings$|^n_positions$|max_seq_len$|^max_length$|source_positions$", 64),
    (r"image_size$", 32),
    (r"patch_size$", 16),
    (r"intermediate_size|ffn|^d_ff$|^d_inner$|^hidden_dim$|^inner_dim$", 64),
    (r"hidden_size|^d_model$|^n_embd$|^dim$|emb(ed)?(ding)?_(dim|size)$|^embed_dim$|proj_dim$|_dim$", 64),
    (r"^(ssm_)?state_size$|_d_state$|^chunk_size$|_chunk_size$|window|_block_size$|^block_size$", 16),
)


class Outcome(NamedTuple):
    """What came of one class: whether it could be built, whether it works compressed, why not, and what it has."""

    built: bool
    works: bool
    reason: str = ""
    tables: tuple[str, ...] = ()


class Variant(NamedTuple):
    """A way to shrink: patterns left out, lists by layer cut or left to the config to derive, fields set by hand."""

    left_out: tuple[str, ...] = ()
    cut_lists: bool = False
    fields: tuple[tuple[str, Any], ...] = ()


# Where a default config leaves them open, though its model needs them.
OPEN = (("head_dim", 16), ("num_key_value_heads", 4), ("n_routed_experts", 4), ("num_experts_per_tok", 2))
VARIANTS = (
    Variant(),
    Variant(cut_lists=True),
    Variant(fields=OPEN),
    Variant(fields=(*OPEN, ("num_experts_per_tok", 2), ("topk_method", "greedy"))),
    Variant(fields=(("layer_types", ["full_attention"] * 2),)),
    Variant(fields=(("num_hidden_layers", 8),)),
    Variant(left_out=("head_dim",)),
    Variant(left_out=("layers", "depth")),
    Variant(left_out=("experts",)),
    Variant(left_out=("key_value_heads",)),
    Variant(left_out=("hidden_size", "_dim", "embedding_size")),
    Variant(left_out=("head_dim", "lora", "heads", "state", "layers")),
)

# What no rule by name finds: sizes that depend on each other, and what a user has to choose.
ROPE = {"rope_type": "default", "rope_theta": 1e4}
BY_HAND: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2, "rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": 4, "vocab_size": VOCAB},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "longcat_flash": {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "head_dim": 16, "qk_head_dim": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "perceiver": {"d_latents": 64, "num_latents": 16, "num_self_attends_per_block": 2, "vocab_size": VOCAB},
    "reformer AutoModelForCausalLM": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
}


def shrunk(name: str, value: Any, left_out: tuple[str, ...]) -> Any:
    """A size that is no larger than a tiny model needs, by its name."""
    if type(value) is not int or any(re.search(part, name) for part in left_out):
        return value
    for pattern, size in SIZES:
        if re.search(pattern, name):
            return min(value, size)
    return value


def tiny_fields(config: PreTrainedConfig, variant: Variant) -> dict[str, Any]:
    """The arguments that make a tiny config of a class, from one with its defaults."""
    layers = getattr(config, "num_hidden_layers", None)
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("transformers_version", "architectures", "dtype"):
            continue
        if isinstance(value, PreTrainedConfig):
            if smaller := tiny_fields(value, variant):
                found[name] = {"model_type": value.model_type, **smaller}
        elif (small := shrunk(name, value, variant.left_out)) != value:
            found[name] = small
        elif isinstance(value, (list, tuple)) and len(value) == layers and variant.cut_lists:
            found[name] = value[: shrunk("num_hidden_layers", layers, variant.left_out)]
        elif isinstance(value, list) and value and name.endswith("token_id"):
            found[name] = 2
    return {**found, **{name: value for name, value in variant.fields if hasattr(config, name)}}


def merged(fields: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Fields with others over them, those of nested configs one by one."""
    nested = {name: merged(fields[name], value) for name, value in others.items() if type(fields.get(name)) is dict}
    return {**fields, **others, **nested}


def inputs_of(config: PreTrainedConfig) -> dict[str, Tensor]:
    """Token ids, none of which is a special one."""
    ids = torch.randint(8, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if config.is_encoder_decoder else {"input_ids": ids}


@torch.no_grad()
def answers(model: PreTrainedModel) -> Tensor:
    """The logits for random token ids."""
    torch.manual_seed(2)  # some models draw random numbers in evaluation, too
    return model.eval()(**inputs_of(model.config)).logits


def check_reloaded(again: PreTrainedModel, model: PreTrainedModel, what: str) -> None:
    """Refuses a model of other tensors than the one that was saved, or of other answers."""
    found, expected = again.state_dict(), model.state_dict()
    if found.keys() != expected.keys() or not all(torch.equal(found[key], expected[key]) for key in expected):
        raise ValueError(f"{what} has other tensors after a reload")
    if not torch.allclose(answers(again), answers(model), rtol=1e-5, atol=1e-5):
        raise ValueError(f"{what} answers otherwise after a reload")


def build(model_type: str, auto: type) -> PreTrainedModel:
    """A tiny stock model that runs; the error of the plainest variant if none does."""
    first: Exception | None = None
    for variant in VARIANTS:
        try:
            config_class = CONFIG_MAPPING[model_type]
            by_hand = BY_HAND.get(f"{model_type} {auto.__name__}", BY_HAND.get(model_type, {}))
            config = config_class(**merged(tiny_fields(config_class(), variant), by_hand))
            config.use_cache = False  # tiny hybrids may lack the kind of layer that their caches count with
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
            if size > MAX_PARAMETERS:
                raise ValueError(f"{size:,} parameters are left after shrinking")
            torch.manual_seed(0)
            model = auto.from_config(config)
            if not answers(model).isfinite().all():
                raise ValueError("the stock model answers with NaNs")
            return model
        except TimeoutError:
            raise
        except Exception as error:  # whatever a config or a model raises is the finding
            first = first or error
    assert first is not None
    raise first


def outcome(model_type: str, auto_name: str) -> Outcome:
    """Builds, compresses, saves, reloads and expands one class."""
    auto = getattr(transformers, auto_name)
    with tempfile.TemporaryDirectory() as folder, time_limit():
        try:
            stock = build(model_type, auto)
            stock.save_pretrained(folder)
            dense = auto.from_pretrained(folder)
            check_reloaded(dense, stock, "the stock model")
        except Exception as error:
            return Outcome(built=False, works=False, reason=describe(error))
        tables: tuple[str, ...] = ()
        try:
            model = hf_dirembed.compress(dense, bits=7)
            tables = tables_of(model)
            if left := [table.name for table in hf_dirembed.find_tables(model) if not table.compressed]:
                raise ValueError(f"{', '.join(left)} stayed dense")
            expected = answers(model)
            model.save_pretrained(Path(folder) / "compressed")
            again = auto.from_pretrained(Path(folder) / "compressed")
            check_reloaded(again, model, "it")
            torch.testing.assert_close(answers(hf_dirembed.expand(again)), expected, rtol=1e-3, atol=1e-3)
            again.save_pretrained(Path(folder) / "expanded")
            check_reloaded(auto.from_pretrained(Path(folder) / "expanded"), again, "the expanded model")
        except Exception as error:
            return Outcome(built=True, works=False, reason=describe(error), tables=tables)
    return Outcome(built=True, works=True, tables=tables)


def tables_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The vocabulary tables of a compressed model: path, kind, and in how many blocks each is compressed."""
    found = []
    for table in hf_dirembed.find_tables(model):
        layout = getattr(model.get_submodule(table.name), "layout", None)
        blocks = f", {len(layout.blocks)} blocks" if isinstance(layout, BlocksLayout) else ""
        state = "" if table.compressed else ", dense"
        found.append(f"`{table.name}` ({table.kind}{blocks}{state})")
    return tuple(found)


def describe(error: Exception) -> str:
    """The first line of an error, in one table cell."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].replace("|", "/")
    return text if len(text) <= 160 else f"{text[:157]}..."


@contextmanager
def time_limit() -> Iterator[None]:
    """Raises TimeoutError inside when a class takes too long."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


NOT_TRIED = (
    "No tiny stock model could be made of these that runs on text and survives its own saving and loading. That says "
    "nothing of real models, whose configs have the sizes that they need."
)


def report(outcomes: dict[tuple[str, str], Outcome]) -> str:
    """The page: a summary, a table of what works, and the reasons of the rest."""
    lines = [
        "# Architectures",
        "",
        "This page lists the architectures of transformers that can be compressed. "
        "`python benchmarks/families.py` wrote it: it "
        f"makes a tiny random model of every language-model class that transformers {transformers.__version__} has, "
        "compresses all its tables, saves and loads it, and compares its answers with those of the same model "
        "expanded.",
        "",
        "The third column counts the architectures of which such a tiny model could be made and run at all, before "
        "anything was compressed; the last, those of them that then worked compressed.",
        "",
        "| class | in transformers | can be built here | work compressed |",
        "| --- | --- | --- | --- |",
    ]
    for auto in TASKS:
        found = [outcome for (_, name), outcome in outcomes.items() if name == auto]
        built, works = sum(o.built for o in found), sum(o.works for o in found)
        lines.append(f"| `{auto}` | {len(found)} | {built} | {works} ({100 * works / max(built, 1):.0f} %) |")
    lines += ["", "## What works", ""]
    lines += [
        "All vocabulary tables of these are compressed. An `input` table is what token ids look up, a `head` is what "
        "hidden states are multiplied with for the logits, and a `tied head` shares the codes of the input table.",
        "",
    ]
    for auto in TASKS:
        lines += [f"### `{auto}`", "", "| architecture | tables |", "| --- | --- |"]
        working = [(t, o) for (t, name), o in sorted(outcomes.items()) if name == auto and o.works]
        lines += [f"| `{model_type}` | {', '.join(o.tables)} |" for model_type, o in working] + [""]
    for title, built in (("What does not", True), ("What could not be tried", False)):
        rest = [(key, o) for key, o in sorted(outcomes.items()) if not o.works and o.built == built]
        lines += [f"## {title}", ""]
        lines += [] if built else [NOT_TRIED, ""]
        lines += ["| architecture | class | why |", "| --- | --- | --- |"]
        lines += [f"| `{model_type}` | `{auto}` | {o.reason} |" for (model_type, auto), o in rest] + [""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Tries every class, prints each outcome, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="model types to try; all by default")
    parser.add_argument("--out", type=Path, help="where to write the page")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    outcomes: dict[tuple[str, str], Outcome] = {}
    for auto, mapping in TASKS.items():
        for model_type in sorted(mapping):
            if arguments.only and model_type not in arguments.only:
                continue
            found = outcomes[model_type, auto] = outcome(model_type, auto)
            verdict = "works" if found.works else "fails" if found.built else "cannot be built"
            print(f"{auto} {model_type}: {verdict} {found.reason}".rstrip(), flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(exist_ok=True)
        arguments.out.write_text(report(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
