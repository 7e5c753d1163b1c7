"""Make tiny random bases of each supported architecture, with a tokenizer and a chat template, as real files."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from edgetune_export.architectures import known
from edgetune_export.backends.onnx.tokenizer import write_tokenizer
from edgetune_runtime.formats.gguf_file import read_header
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from edgetune.bases import locate

FEW = ("llama", "qwen2", "qwen3", "gemma3")
"""The architectures for slow tests; the differences of the others do not matter there."""
ARCHITECTURES = (
    *FEW,
    "mistral",
    "smollm3",
    "granite",
    "granitemoehybrid",
    "ernie4_5",
    "gemma4",
    "hunyuan_dense",
    "lfm2",
    "olmo2",
    "phi3",
    "qwen35",
)
WITH_SMOLLM2_TOKENS = ("hunyuan_dense", "lfm2", "olmo2", "qwen35")
"""llama.cpp converts these only with a BPE tokenizer that it knows, which has 49,152 tokens."""
FIRST_TOKENS = 4096
"""How many of them most tests use: with all, a base takes 20 times as long to open and 5 times to compute."""
GRANITE: dict[str, Any] = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.5,
    "residual_multiplier": 0.75,
    "logits_scaling": 0.5,
    "tie_word_embeddings": True,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    # llama.cpp ignores this attention window, which is as long as the context.
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 512}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True}),
    # llama.cpp uses full attention in every sixth layer of a Gemma 3, so one of six layers has it.
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"num_hidden_layers": 6, "sliding_window": 16}),
    # The last two of six layers share keys and values, and have wider feed-forward blocks, as in E2B.
    "gemma4": (
        Gemma4ForCausalLM,
        Gemma4TextConfig,
        {
            "num_hidden_layers": 6,
            "layer_types": [*["sliding_attention"] * 3, "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "sliding_window": 16,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 32,
            "final_logit_softcapping": 30.0,
        },
    ),
    # Every fourth layer has no rotary embedding.
    "smollm3": (
        SmolLM3ForCausalLM,
        SmolLM3Config,
        {"num_hidden_layers": 4, "pad_token_id": None, "tie_word_embeddings": True},
    ),
    "granite": (GraniteForCausalLM, GraniteConfig, GRANITE),
    # Its settings for Mamba layers are there even if it has none.
    "granitemoehybrid": (
        GraniteMoeHybridForCausalLM,
        GraniteMoeHybridConfig,
        {
            **GRANITE,
            "layer_types": ["attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 128,
            "position_embedding_type": "rope",
            "mamba_n_heads": 8,
        },
    ),
    "ernie4_5": (Ernie4_5ForCausalLM, Ernie4_5Config, {"tie_word_embeddings": True}),
    "hunyuan_dense": (
        HunYuanDenseV1ForCausalLM,
        HunYuanDenseV1Config,
        {
            # Real ones have an alpha of 1000, with which heads of this size would hardly rotate.
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 20.0, "factor": 1.0},
            # llama.cpp's converter requires this length for such an embedding.
            "max_position_embeddings": 262144,
            "eod_token_id": 2,
            "pad_token_id": None,
            "tie_word_embeddings": True,
        },
    ),
    # Layers with convolutions before and after one with attention, as real ones have.
    "lfm2": (
        Lfm2ForCausalLM,
        Lfm2Config,
        {
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "block_multiple_of": 64,
            "pad_token_id": None,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {"pad_token_id": None}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"original_max_position_embeddings": 512, "pad_token_id": None}),
    "qwen35": (
        Qwen3_5ForCausalLM,
        Qwen3_5TextConfig,
        {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            # Three value heads for each key head, as in the largest; the smallest have as many of both.
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
            },
            "tie_word_embeddings": True,
        },
    ),
}
"""Model class, configuration class and special configuration values of each architecture."""
SAME_MODULES = tuple(arch for arch in ARCHITECTURES if not known()[arch].split_modules)
"""The architectures whose folders have the linear modules that edgetune trains."""
FINGERPRINT = "ab" * 32
ENCODERS = ("bert", "distilbert", "electra", "roberta")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "turn on off the lamp light in hall kitchen set heat to blind open close play stop what is time reply red warm"


def make_tokenizer(folder: Path, controls: Sequence[str] = (), *, begins_with_space: bool = True) -> Path:
    """Train a small SentencePiece tokenizer (byte fallback, chat markers, control tokens) and return its model file.

    Those of Gemma add no space at the beginning of a text.
    """
    rng = random.Random(0)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(" ".join(rng.choices(WORDS.split(), k=rng.randint(3, 9))) for _ in range(1000)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        control_symbols=list(controls),
        add_dummy_prefix=begins_with_space,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def make_model(arch: str, vocab_size: int, hidden_size: int = 64) -> PreTrainedModel:
    """A random two-layer model with grouped-query attention; its weights are large enough for varied answers."""
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        # transformers uses 128 for a Qwen 3 GGUF, whatever the file says; architectures/base.py corrects it.
        "head_dim": hidden_size // 4,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if arch in {"granite", "granitemoehybrid", "lfm2", "phi3"}:
        # GGUF files of these architectures have no head size.
        del common["head_dim"]
    model_class, config_class, own = MODELS[arch]
    if arch == "gemma4":
        own = {**own, "vocab_size_per_layer_input": vocab_size}
    if arch == "gemma3":
        own = {"query_pre_attn_scalar": common["head_dim"], **own}
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config_class(**common | own))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # A kernel of a convolution adds only a few values.
                torch.nn.init.normal_(parameter, std=0.08 if parameter.dim() == 2 else 0.5)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.08)
            if name.endswith(".A_log"):
                # With larger ones, a delta net would forget all but the last token.
                torch.nn.init.uniform_(parameter, -5.0, -1.0)
            if arch == "gemma4" and name.endswith(("q_norm.weight", "k_norm.weight")):
                # It scales the scores of attention by these weights alone.
                torch.nn.init.constant_(parameter, parameter.numel() ** -0.25)
            if name.endswith("post_per_layer_input_norm.weight"):
                # Random inputs of layers are small, and so would be as large as all else, with their rounding errors.
                torch.nn.init.constant_(parameter, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith(".layer_scalar"):
                torch.nn.init.uniform_(buffer, 0.7, 1.0)
    return model.float()


def make_folder(arch: str, folder: Path, tokenizer: Path, hidden_size: int = 64) -> Path:
    """Save a tiny model and its tokenizer as a Hugging Face folder."""
    if arch in WITH_SMOLLM2_TOKENS:
        smollm2 = locate("smollm2-135m", folder)
        make_model(arch, len(read_header(smollm2).metadata["tokenizer.ggml.tokens"])).save_pretrained(folder)
        write_tokenizer(smollm2, folder)
        return folder
    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)).vocab_size()
    folder.mkdir(parents=True, exist_ok=True)
    if arch == "phi3":
        # llama.cpp does not load a Phi-3 without this token.
        (folder / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": vocab_size}))
        vocab_size += 1
    make_model(arch, vocab_size, hidden_size).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if arch == "gemma4":
        # llama.cpp converts it only with a tokenizer.json, in which the names of control tokens are special.
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        controls = [pieces.id_to_piece(number) for number in range(3, vocab_size) if pieces.is_control(number)]
        specials = ["<|im_start|>", "<|im_end|>", *controls]
        loaded = AutoTokenizer.from_pretrained(folder, additional_special_tokens=specials)
        (folder / "tokenizer.model").unlink()
        loaded.save_pretrained(folder)
    return folder


def make_encoder(arch: str, vocab_size: int) -> PreTrainedModel:
    """A random encoder of one layer (bert: two) for texts of at most 64 tokens."""
    torch.manual_seed(0)
    common = {"vocab_size": vocab_size, "pad_token_id": 0}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    if arch == "distilbert":
        config = DistilBertConfig(**common, dim=64, hidden_dim=128, n_layers=1, n_heads=4, max_position_embeddings=64)
    elif arch == "electra":
        config = ElectraConfig(**common, **sizes, embedding_size=32, max_position_embeddings=64)
    elif arch == "roberta":
        # Its positions begin after the padding token's id.
        config = RobertaConfig(**common, **sizes, max_position_embeddings=65)
    else:
        config = BertConfig(**common, **sizes | {"num_hidden_layers": 2}, max_position_embeddings=64)
    model: PreTrainedModel = AutoModel.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or (name.endswith(".bias") and "LayerNorm" not in name):
                torch.nn.init.normal_(parameter, std=0.08)
    return model.float()


def make_encoder_folder(arch: str, folder: Path) -> Path:
    """Save a tiny encoder and its WordPiece tokenizer, which pads and truncates like those of sentence encoders."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS.split()), "##s", "##ing"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(piece, vocabulary[piece]) for piece in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    make_encoder(arch, len(pieces)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def load_encoder(folder: Path) -> PreTrainedModel:
    """Load the encoder of a folder as training does: without BERT's pooler."""
    model: PreTrainedModel = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    if hasattr(model, "pooler"):
        model.pooler = None
    return model
