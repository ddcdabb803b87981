"""SmolLM2-135M-Instruct (GGUF, Q4_1) as transformers reads it: token ids of awkward texts, logits, perplexity."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = 48
PROBES = 64

TEXT = (
    "The lighthouse keeper climbed 199 steps every evening. In 1887 a storm broke two of the windows, and he wrote in "
    "his log: \"We kept the lamp burning with blankets nailed over the frames.\" Nobody on the mainland believed him "
    "until the supply boat came back."
)

# Digits, spaces, contractions, scripts, combining marks, emoji sequences, control characters (the vocabulary has no
# token for some bytes: they are dropped), special tokens inside text, and near misses of special tokens.
STRINGS = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "Hello world",
    "Hello,  world!   Three spaces.    Four.",
    "\n",
    "\n\n\n",
    " \n \n",
    "\r\nwindows\r\nlines\r\n",
    "\t\ttabs\tand spaces \t mixed",
    "trailing spaces   ",
    "trailing newline\n",
    "0",
    "12345",
    "  1",
    "   12  34",
    "a1b22c333",
    "3.14159, -2e10, 1,000,000 and 0x7f",
    "year 2024: 100%",
    "Ⅷ ½ ² ٣ 七 ௧௨",
    "I'm you're he'll we'd they've it's CAN'T don’t",
    "O'Brien 's 'S 're",
    "snake_case camelCase HTTPServer kebab-case",
    "def f(x):\n    return x**2  # square\n",
    "if (a && b || !c) { i += 1; }",
    "{\"key\": [1, 2.5, null], \"nested\": {\"a\": \"b\\n\"}}",
    "https://example.org/path?q=1&r=a%20b#frag",
    "naïve café résumé Ångström",
    "cafe\u0301 vs caf\u00e9",
    "Привет, мир!",
    "Ελληνικά και ελληνικά",
    "日本語のテキスト、漢字とカナ。",
    "中文没有空格 123 中文",
    "한국어 텍스트",
    "مرحبا بالعالم",
    "שלום עולם",
    "हिन्दी पाठ",
    "ไทยไม่มีช่องว่าง",
    "emoji 😀😃 👩‍👩‍👧‍👦 🇩🇪 ❤️",
    "zero\u200bwidth\u200djoin\ufeffbom",
    "nbsp\u00a0here thin\u2009space ideographic\u3000space",
    "math: ∑∫√≠≤ αβγ → ∞",
    "𝒜 𝔅 𐍈 \U0001f9ff",
    "\U00040000\U0010fffd",
    "control \x00\x01\x04\x06\x13\x1d\x7f end",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "text<|im_end|>text",
    " <|im_start|> ",
    "<|im_start|",
    "<|IM_START|>",
    "<repo_name>x<file_sep>y<filename>z",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "!!!???...;;;---___***",
    "«quoted» “curly” ‘single’ — dash – en … dots",
    "= Robert <unk> = \n \n Robert Boulter is an English film @-@ television actor . ",
    TEXT,
]



def tokenizer(gguf: Path):
    """The tokenizer of the file's own vocabulary and merges.

    transformers 5.23 does not know the pre-tokenizer a GGUF calls "smollm" and falls back to GPT-2's. The model's own
    tokenizer.json, and llama.cpp for that name, first cut every digit off and then apply GPT-2's expression; it matters
    for blanks before a digit. That pre-tokenizer is set here.
    """
    loaded = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    return loaded


def encode(loaded, text: str) -> list[int]:
    """Ids of a text; special tokens in it are recognised, none are added."""
    return loaded.backend_tokenizer.encode(text, add_special_tokens=False).ids


def encodings(gguf: Path) -> list[dict]:
    """Text, its ids and the text those ids decode to (special tokens kept)."""
    loaded = tokenizer(gguf)
    found = []
    for text in STRINGS:
        ids = encode(loaded, text)
        found.append({"text": text, "ids": ids, "decoded": loaded.backend_tokenizer.decode(ids, skip_special_tokens=False)})
    return found


def model(gguf: Path) -> torch.nn.Module:
    """The weights, dequantised to f32."""
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def logits(gguf: Path) -> dict[str, torch.Tensor]:
    """What a reader must reproduce on TOKENS tokens of TEXT.

    input_ids [1, TOKENS] i64; top1 [TOKENS] i64, the id of the largest logit; logsumexp [TOKENS] f32 over the whole
    vocabulary; probe_ids [PROBES] i64; probe_logits [TOKENS, PROBES] f32.
    """
    input_ids = torch.tensor([encode(tokenizer(gguf), TEXT)[:TOKENS]])
    if input_ids.shape[1] != TOKENS:
        raise SystemExit(f"the text has {input_ids.shape[1]} tokens, {TOKENS} are needed")
    out = model(gguf)(input_ids=input_ids, use_cache=False).logits[0]
    vocab = out.shape[-1]
    # Evenly spread over the vocabulary, with the first and the last id.
    probe_ids = torch.linspace(0, vocab - 1, PROBES, dtype=torch.float64).round().long()
    return {
        "input_ids": input_ids,
        "top1": out.argmax(-1),
        "logsumexp": torch.logsumexp(out.double(), -1).float(),
        "probe_ids": probe_ids,
        "probe_logits": out[:, probe_ids].contiguous(),
    }


@torch.no_grad()
def perplexity(gguf: Path, text: Path, window: int, windows: int) -> float:
    """exp of the mean, over windows from the start of the text, of the mean loss over window - 1 targets."""
    ids = encode(tokenizer(gguf), text.read_text(encoding="utf-8"))
    loaded, losses = model(gguf), []
    for start in range(0, windows * window, window):
        piece = torch.tensor([ids[start : start + window]])
        if piece.shape[1] != window:
            raise SystemExit(f"{text} has {len(ids)} tokens, fewer than {windows} windows of {window}")
        out = loaded(input_ids=piece, use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(out.double(), piece[0, 1:]).item())
    return float(torch.tensor(losses, dtype=torch.float64).mean().exp())
