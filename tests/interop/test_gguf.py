"""A real llama.cpp loads our GGUF files, computes what transformers computes, and tokenizes as it does.

Weights in F32 leave no freedom, so logits must agree to rounding: a wrong key, name, shape or row order changes them by
something like their own size. Quantized files are held to a Kullback-Leibler divergence.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFValueType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from qconv.artifacts.source import Source
from qconv.building.gguf_pipeline import quantize_gguf
from qconv.building.sized_pipeline import quantize_to_size
from qconv.checkpoint.tokenizer import load_tokenizer as load_kimi
from qconv.conversion.pipeline import Wanted, convert
from qconv.formats.gguf.mixture import FILE_TYPES
from qconv.formats.gguf.pre_tokenizers import GPT2, PRE_TOKENIZERS
from qconv.grids.blocks import BlockGrid
from qconv.grids.ggml import GgmlType
from qconv.planning.gguf_plan import plan_gguf, write_file
from qconv.planning.gguf_recipe import parse_gguf_recipe
from qconv.runtime.loading import load
from qconv.runtime.tokenizer import load_tokenizer
from qconv.sensitivity.allocating import Request, Target
from tests.conftest import build, random_model, save_model, small_recipe
from tests.gguf_copies import copied
from tests.interop.conftest import MODEL, Client
from tests.interop.environments import CHECKOUT
from tests.kimi import ROWS, save_kimi
from tests.kimi import TEXT as KIMI_TEXT

pytestmark = pytest.mark.interop

FLOAT32_BOUND = 1e-3
"""Largest difference of a logit: the order of float32 sums, over logits of up to 12."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen2_moe": ("qwen2_moe", {"head_dim": 16}),
    "mixtral": ("mixtral", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
}
FIRST_NAMES = list({kind: name for name, kind in reversed(PRE_TOKENIZERS.items())}.values())
"""A name of each way of cutting text."""
ADD_BOS = "tokenizer.ggml.add_bos_token"


@dataclass(frozen=True)
class Answer:
    """What llama.cpp said: ``logits[i]`` is [tokens, vocabulary]; bos, eos, pad, whether bos and eos are added."""

    logits: list[Tensor]
    tokens: list[list[int]]
    generated: list[int]
    special: list[int]


@dataclass
class Llama:
    """llama.cpp in its own process."""

    client: Client
    folder: Path
    runs: int = field(default=0)

    def __call__(
        self, model: Path, sequences: Sequence[Sequence[int]] = ((1,),), texts: Sequence[str] = (), generate: int = 0
    ) -> Answer:
        self.runs += 1
        request, answer = self.folder / f"request-{self.runs}.json", self.folder / f"answer-{self.runs}.npz"
        request.write_text(
            json.dumps({"sequences": [list(one) for one in sequences], "texts": list(texts), "generate": generate})
        )
        self.client("llamacpp", "llamacpp", model, request, answer)
        found = np.load(answer)
        return Answer(
            [torch.from_numpy(found[f"logits/{index}"]) for index in range(len(sequences))],
            [found[f"tokens/{index}"].tolist() for index in range(len(texts))],
            found["generated"].tolist() if generate else [],
            found["special"].tolist(),
        )


@pytest.fixture
def llama(client: Client, tmp_path: Path) -> Llama:
    """Runs llama.cpp."""
    return Llama(client, tmp_path)


def write(model: Path, out: Path, file_type: str, max_split_size: int = 2**60) -> list[Path]:
    """A checkpoint as GGUF; its files in order."""
    out.mkdir()
    source = Source.open(model)
    plan = plan_gguf(source, file_type, "model", max_split_size=max_split_size)
    for layout in plan.files:
        write_file(out, plan, layout, source)
    return [out / layout.name for layout in plan.files]


def sequences(vocabulary: int) -> list[list[int]]:
    """Token ids that no tokenizer gives: every row of the embedding can occur."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in (64, 33, 1)]


def transformers_logits(model: Any, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
    """float32 [tokens, vocabulary] of each sequence."""
    with torch.no_grad():
        return [model(torch.tensor([list(one)])).logits[0].float() for one in tokens]


def bundled_logits(tokens: Sequence[Sequence[int]]) -> list[Tensor]:
    """The bundled model's."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return transformers_logits(model.eval(), tokens)


def divergence(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Mean Kullback-Leibler divergence over all positions, in nats."""
    p = torch.log_softmax(torch.cat(list(reference)).double(), dim=-1)
    q = torch.log_softmax(torch.cat(list(other)).double(), dim=-1)
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


def largest_difference(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return float((torch.cat(list(reference)) - torch.cat(list(other))).abs().max())


def test_f32_computes_what_transformers_computes(llama: Llama, tmp_path: Path) -> None:
    (file,) = write(MODEL, tmp_path / "f32", "F32")
    tokens = sequences(2048)
    assert largest_difference(bundled_logits(tokens), llama(file, tokens).logits) <= FLOAT32_BOUND


def test_f16_hardly_diverges(llama: Llama, tmp_path: Path) -> None:
    (file,) = write(MODEL, tmp_path / "f16", "F16")
    tokens = sequences(2048)
    # bf16 weights lose nothing in float16 but the smallest; llama.cpp also rounds the activations.
    assert divergence(bundled_logits(tokens), llama(file, tokens).logits) < 1e-5


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_computes_what_transformers_computes(name: str, llama: Llama, tmp_path: Path) -> None:
    family, changes = ARCHITECTURES[name]
    model = random_model(family, **changes)
    (file,) = write(save_model(model, tmp_path / "model"), tmp_path / "f32", "F32")
    tokens = sequences(2048)
    assert largest_difference(transformers_logits(model, tokens), llama(file, tokens).logits) <= FLOAT32_BOUND


FURTHER = {"IQ1_M": 0.4, "IQ1_S": 0.4, "TQ1_0": 1.2, "TQ2_0": 1.2}
"""Measured 0.20, 0.23 and 0.70: below two bits without an imatrix; by formula for a model that is not ternary."""


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_file_type_loads_and_generates(file_type: str, llama: Llama, tmp_path: Path) -> None:
    (file,) = write(MODEL, tmp_path / "quantized", file_type)
    tokens = sequences(2048)
    answer = llama(file, tokens, generate=16)
    assert len(answer.generated) == 16
    # Measured 0.08 for Q2_K and 0.10 for IQ2_XXS, without an imatrix; equal probabilities for all tokens are 2.8 away.
    assert divergence(bundled_logits(tokens), answer.logits) < FURTHER.get(file_type, 0.2)


@pytest.mark.parametrize("type", [type for type in GgmlType if BlockGrid(type).has_codes], ids=lambda type: type.name)
def test_calibrated_files_of_every_type_load_generate_and_have_one_perplexity(
    type: GgmlType, llama: Llama, tmp_path: Path
) -> None:
    values = {"type": "BF16", "tensor_types": {r"blk\..*(attn|ffn)": type.name}, "refine": {"sweeps": 1, "refits": 1}}
    text = {"calibration": {"tokens": 1024, "sequence_length": 64, "propagate": "matched"}}
    recipe = parse_gguf_recipe(values | text)
    report = quantize_gguf(MODEL, tmp_path / "out", recipe, progress=lambda *_: None, log=lambda _: None).report
    assert report["method"] == "gptq"
    assert {one["type"] for name, one in report["tensors"].items() if "exps" in name} == {type.name}
    assert_computed_alike(tmp_path / "out" / report["files"][0], llama)


def test_a_file_with_scales_folded_in_is_computed_alike(llama: Llama, tmp_path: Path) -> None:
    text = {"tokens": 1024, "sequence_length": 64}
    recipe = parse_gguf_recipe({"type": "Q4_K_M", "method": "awq+gptq", "calibration": text})
    report = quantize_gguf(MODEL, tmp_path / "out", recipe, progress=lambda *_: None, log=lambda _: None).report
    assert any(not one["kept_rtn"] for layer in report["layers"] for one in layer["searches"].values())
    assert_computed_alike(tmp_path / "out" / report["files"][0], llama)


def test_a_build_of_a_size_whose_tensors_all_differ_is_computed_alike(llama: Llama, tmp_path: Path) -> None:
    recipe = parse_gguf_recipe({"type": "Q4_K_M", "calibration": {"tokens": 1024, "sequence_length": 64}})
    quiet: dict[str, Any] = {"progress": lambda *_: None, "log": lambda _: None}
    report = quantize_to_size(MODEL, tmp_path / "out", recipe, Request(Target(bits=4.2)), **quiet).report
    types = {one["type"] for one in report["tensors"].values()} - {"F32"}
    assert len(types) >= 4  # of the eight that there are to choose from
    assert_computed_alike(tmp_path / "out" / report["files"][0], llama)


@pytest.mark.parametrize(
    ("output_format", "grid", "type"),
    [
        ("w4a16", {"group_size": 32}, "Q4_0"),
        ("w4a16", {"bits": 8, "group_size": 32}, "Q8_0"),
        ("mxfp4", {"group_size": 32}, "MXFP4"),
        ("nvfp4", {"group_size": 16}, "NVFP4"),
    ],
)
def test_builds_that_were_converted_are_computed_alike(
    output_format: str, grid: dict[str, int], type: str, llama: Llama, tmp_path: Path
) -> None:
    build(MODEL, tmp_path / "build", small_recipe("rtn", output_format, grid=grid))
    quiet: dict[str, Any] = {"progress": lambda *_: None, "log": lambda _: None}
    report = convert(tmp_path / "build", tmp_path / "out", Wanted("gguf"), **quiet).report
    assert {one["type"] for name, one in report["tensors"].items() if "exps.weight" in name} == {type}
    assert_computed_alike(tmp_path / "out" / report["files"][0], llama)


def assert_computed_alike(file: Path, llama: Llama) -> None:
    """llama.cpp generates from a file, and has our perplexity and distributions."""
    ids = load_tokenizer(MODEL)((CHECKOUT / "evals/quality.py").read_text()).input_ids[:256]
    answer = llama(file, [ids], generate=16)
    assert len(answer.generated) == 16
    with torch.no_grad():
        ours = load(file, backend="reference")(torch.tensor([ids])).logits[0].float()
    theirs, wanted = answer.logits[0], torch.tensor(ids[1:])
    losses = [torch.nn.functional.cross_entropy(logits[:-1].double(), wanted).item() for logits in (ours, theirs)]
    # llama.cpp rounds what a matrix is multiplied with to eight bits, in blocks of 32 or 256.
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert divergence([ours], [theirs]) < 0.005


def test_rows_that_no_block_divides_load(llama: Llama, tmp_path: Path) -> None:
    model = random_model("qwen3_moe", norm_topk_prob=True)  # rows of 32, 64 and 96
    (file,) = write(save_model(model, tmp_path / "model"), tmp_path / "quantized", "Q4_K_M")
    tokens = sequences(2048)
    # Q5_0 and Q8_0 take the place of Q4_K and Q6_K. Measured 0.18; 1.2 with the downs of one layer in a wrong order.
    assert divergence(transformers_logits(model, tokens), llama(file, tokens).logits) < 0.4


def test_splits_load_as_the_whole(llama: Llama, tmp_path: Path) -> None:
    (whole,) = write(MODEL, tmp_path / "whole", "Q8_0")
    files = write(MODEL, tmp_path / "splits", "Q8_0", max_split_size=2 * 10**6)
    assert len(files) > 5
    tokens = sequences(2048)
    assert largest_difference(llama(whole, tokens).logits, llama(files[0], tokens).logits) == 0.0


def test_a_long_vocabulary_is_padded_and_special_tokens_are_found(llama: Llama, tmp_path: Path) -> None:
    model = random_model("qwen3", vocab_size=2060)
    (file,) = write(save_model(model, tmp_path / "model"), tmp_path / "f32", "F32")
    tokens = sequences(2060)
    answer = llama(file, tokens)
    assert largest_difference(transformers_logits(model, tokens), answer.logits) <= FLOAT32_BOUND
    assert answer.special == [0, 0, 0, False, False]


def texts() -> list[str]:
    """200 texts: code, prose in many scripts, runs of white space, special tokens, digits, contractions."""
    code = "".join(path.read_text() for path in sorted((CHECKOUT / "qconv").rglob("*.py")))
    found = [code[start : start + 700] for start in range(0, 100 * 700, 700)]
    found += [
        "Größe naïve café — “quoted” … ½ ² ﬁ",
        "Привет, мир! Ελληνικά και ύδωρ",
        "日本語のテキストと漢字、カタカナ。中文字符測試",
        "한국어 문장입니다. العربية تجربة שלום עולם",
        "हिन्दी वाक्य ไทยภาษา tiếng Việt có dấu",
        "😀👍🏽👩‍👩‍👧‍👦🇩🇪 emoji\u200dzwj \ufeffbom",
        "e\u0301 decomposed, Å angstrom, \u00a0nbsp\u2003em space\u3000ideographic",
        "I'm you're he'll WE'VE they'D it's'S ''s",
        "1234567890 12 345 6.789e-10 0xDEADBEEF ١٢٣ Ⅷ 1st",
        "a\r\nb\rc\n\n\nd \n e\t\t\tf \r\n \r\n",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
        "<|im_start|><|im_end|><|endoftext|> <|im_start|> x<|im_end|>y <|im_unknown|> <|endoftext",
        "\x00\x01\x7f control \x1b[0m",
        "",
        " ",
        "\n",
        "snake_case camelCase SCREAMING_CASE kebab-case $var @dec #tag a->b c::d e.f(g)[h]{i}",
        "!!!???...,,,;;; ~~~ ``` === --- *** /// \\\\\\ |||",
    ]
    found += [f"{before}{' ' * count}{after}" for count in range(1, 17) for before, after in (("", "x"), ("y", ""))]
    found += ["\t" * count + "return" for count in range(1, 11)]
    found += ["\n" * count + " " * count + "z" for count in range(1, 11)]
    alphabet = [chr(code) for code in (*range(32, 127), 0xE4, 0x3B1, 0x4E2D, 0x1F600, 0x0A, 0x0D, 0x09, 0x2028)]
    generator = torch.Generator().manual_seed(1)
    while len(found) < 200:
        picks = torch.randint(0, len(alphabet), (60,), generator=generator).tolist()
        found.append("".join(alphabet[pick] for pick in picks))
    return found


def test_tokenization_is_that_of_transformers(llama: Llama, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (file,) = write(MODEL, tmp_path / "f16", "F16")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert len(texts()) == 200
    expected = [tokenizer(text)["input_ids"] for text in texts()]
    assert llama(file, texts=texts()).tokens == expected


def trained_tokenizer(pre: str, path: Path) -> Tokenizer:
    """A small tokenizer with that pre-tokenizer, trained on this code; it adds a begin token, as Llama 3's does."""
    kind = PRE_TOKENIZERS[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind.ignores_merges))
    *before, last = kind.splits
    steps: list[Any] = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in before]
    if pre == "starcoder":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    if last != GPT2:
        steps.append(pre_tokenizers.Split(Regex(last), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=last == GPT2))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in names],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    begin = names[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


@pytest.mark.parametrize("pre", FIRST_NAMES)
def test_other_pre_tokenizers_tokenize_as_transformers(
    pre: str, llama: Llama, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    from transformers import AutoTokenizer

    model = save_model(random_model("llama"), tmp_path / "model")
    trained_tokenizer(pre, model)
    edit_json(model / "config.json", eos_token_id=3, bos_token_id=0)
    (file,) = write(model, tmp_path / "f16", "F16")
    given = [*texts(), "<tool_call>call</tool_call><tool_call>"]
    answer = llama(file, texts=given)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert answer.tokens == [tokenizer(text)["input_ids"] for text in given]
    assert answer.special[:2] == [0, 3]
    assert answer.special[3:] == [True, False]


def test_ranks_of_tiktoken_tokenize_as_kimi(llama: Llama, tmp_path: Path, edit_json: Callable[..., None]) -> None:
    model = save_model(random_model("llama", vocab_size=ROWS), tmp_path / "model")
    (model / "tokenizer.json").unlink()
    save_kimi(model)
    edit_json(model / "config.json", eos_token_id=ROWS - 255, bos_token_id=ROWS - 256)
    (file,) = write(model, tmp_path / "f16", "F16")
    tokenizer = load_kimi(model)
    given = [
        *texts(),
        KIMI_TEXT,
        *KIMI_TEXT.splitlines(),
        "a中b国",
        "ÀÉé中\u0301x",
        "<|im_user|>user<|im_middle|>hi<|im_end|>",
    ]
    expected = [tokenizer(text)["input_ids"] for text in given]
    assert llama(file, texts=given).tokens == expected
    assert [load_tokenizer(file)(text)["input_ids"] for text in given] == expected


# llama.cpp's kimi-k2 leaves ValueError whole, where the pattern cuts it, and counts on no token lying across the cut.
@pytest.mark.parametrize("pre", [pre for pre in FIRST_NAMES if pre != "kimi-k2"])
def test_tokenizers_of_files_read_as_llama_cpp_reads_them(pre: str, llama: Llama, tmp_path: Path) -> None:
    (file,) = write(MODEL, tmp_path / "q8", "Q8_0")
    copy = copied(file, tmp_path / "copy.gguf", {"tokenizer.ggml.pre": (pre, GGUFValueType.STRING)}, [ADD_BOS])
    tokenizer = load_tokenizer(copy)
    given = texts()[::4]
    assert llama(copy, texts=given).tokens == [tokenizer(text)["input_ids"] for text in given]


@pytest.mark.parametrize("settings", [{"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_only_the_post_processor_adds_tokens(
    settings: dict[str, bool], llama: Llama, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    from transformers import AutoTokenizer

    model = save_model(random_model("llama"), tmp_path / "model")
    trained_tokenizer("gpt-2", model)
    edit_json(model / "tokenizer_config.json", **settings)
    (file,) = write(model, tmp_path / "f16", "F16")
    tokenizer = AutoTokenizer.from_pretrained(model)
    given = ["def f(x):", "a  b"]
    assert llama(file, texts=given).tokens == [tokenizer(text)["input_ids"] for text in given]


def test_a_missing_split_does_not_load(llama: Llama, tmp_path: Path) -> None:
    files = write(MODEL, tmp_path / "splits", "Q8_0", max_split_size=4 * 10**6)
    shutil.move(files[1], tmp_path / "elsewhere.gguf")
    with pytest.raises(AssertionError, match="does not load"):
        llama(files[0])
