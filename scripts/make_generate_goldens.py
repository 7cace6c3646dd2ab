"""Greedy tokens of transformers' generate, for tests/sampling (needs torch and transformers, not vdjax).

    python scripts/make_generate_goldens.py --model tests/data/goldens/NAME --out tests/sampling/goldens/NAME.json
    python scripts/make_generate_goldens.py --model SMOLLM2 --rows ROWS.jsonl --count 64 --new_tokens 64 --out FILE.json

A row of ROWS.jsonl has prompt_ids; without --rows, prompts of 1 to 40 tokens are drawn. Batches of 16 prompts, padded
on the left. Of every token, `gaps` has the distance between the two largest logits: where it is tiny, another
implementation may take the other token.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--new_tokens", type=int, default=20)
    flags = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    if flags.rows:
        prompts = [json.loads(line)["prompt_ids"] for line in flags.rows.read_text().splitlines()][: flags.count]
    else:
        sizes = rng.integers(1, 41, flags.count)
        prompts = [rng.integers(0, model.config.vocab_size, n).tolist() for n in sizes]
    eos = model.generation_config.eos_token_id if flags.rows else None
    stops = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    tokens, gaps = [], []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=flags.new_tokens, pad_token_id=0,
                eos_token_id=eos, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
        top = torch.stack(out.logits, 1).topk(2).values
        for row, gap in zip(out.sequences[:, width:].tolist(), (top[..., 0] - top[..., 1]).tolist(), strict=True):
            length = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            tokens.append(row[:length])
            gaps.append([round(x, 7) for x in gap[:length]])
    golden = {"stop_ids": stops, "new_tokens": flags.new_tokens, "prompts": prompts, "tokens": tokens, "gaps": gaps}
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
