"""A corpus drawn from a causal language model, whose own perplexity of text is then the true one.

    python evals/sampled_corpus.py stories260K corpus.jsonl [--texts 8192] [--tokens 127]

Every text is the model's own continuation of its beginning-of-text token at temperature 1, exactly
`--tokens` tokens long: with the end-of-text token one row of 128. A text that ends earlier, or that
the tokenizer would encode as other tokens than were drawn, is left out (some 6 %). A diffusion
model trained on such a corpus can be judged by the distribution that it was to learn: the judge's
perplexity of the corpus is the least that a model of that distribution can have at its entropy.

With `--whole` a text is one that the model itself ended within `--tokens`; `--top-p` leaves out its
unlikely tokens. `configs/demo.yaml` trains on such stories.

`evals/results/frontier.json` is of a model trained on the first 15,800 texts and compared with the
others (`evals/stories.yaml`). One core of a Zen 3 server CPU takes about 5 minutes for the texts,
24 for the training and 10 to 15 for the sweep, each extrapolated from a part of it:

    python evals/sampled_corpus.py stories260K all.jsonl --texts 17046
    head -n 15800 all.jsonl > corpus.jsonl && tail -n +15801 all.jsonl > reference.jsonl
    textdiff train evals/stories.yaml
    textdiff evaluate runs/stories --judge stories260K --reference reference.jsonl \
        --suite frontier --grid evals/frontier.yaml --num-samples 32 --min-new-tokens 127 \
        --output evals/results/frontier.json --picture evals/results/frontier.png
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub id of a causal LM")
    parser.add_argument("output", type=Path)
    parser.add_argument("--texts", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=127)
    parser.add_argument("--whole", action="store_true", help="keep texts that end, as they are")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    kept = 0
    with arguments.output.open("w") as file:
        while kept < arguments.texts:
            start = torch.full((BATCH, 1), begin)
            with torch.inference_mode():
                rows = model.generate(
                    start,
                    attention_mask=torch.ones_like(start),
                    do_sample=True,
                    top_k=0,
                    top_p=arguments.top_p,
                    max_new_tokens=arguments.tokens,
                    pad_token_id=end,
                )[:, 1:].tolist()
            for drawn in rows:
                length = next((i for i, token in enumerate(drawn) if token in (begin, end)), None)
                row = drawn[:length]
                text = tokenizer.decode(row, skip_special_tokens=True)
                ended = length is not None
                if (
                    ended == arguments.whole
                    and tokenizer.encode(text, add_special_tokens=False) == row
                ):
                    file.write(json.dumps({"text": text}) + "\n")
                    kept += 1
            print(f"{kept} texts", flush=True)


if __name__ == "__main__":
    main()
