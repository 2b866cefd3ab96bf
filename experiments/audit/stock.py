"""A model made without memsinks, by transformers alone, for an audit of somebody else's checkpoint.

    MEMSINKS_DATA=... python experiments/audit/stock.py runs/stock      # trains; about 3 minutes on one thread
    memsinks audit runs/stock/model --documents runs/stock/documents.jsonl --copies-field copies \\
        --controls runs/stock/controls.jsonl --out runs/stock/report

A small GPT-2 (its own tokenizer, dropout, learned positions), stories of TinyStories, 60 of them trained on 4, 16 or 64 times.
"""

import io
import itertools
import json
import os
import random
import sys
from pathlib import Path

import tokenizers
import torch
import transformers
import zstandard

LENGTH, BATCH, SEED = 192, 8, 0

torch.set_num_threads(1)
random.seed(SEED), torch.manual_seed(SEED)
out = Path(sys.argv[1])
with (Path(os.environ["MEMSINKS_DATA"]) / "tinystories.jsonl.zst").open("rb") as file:
    reader = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8")
    texts = [json.loads(line)["text"] for line in itertools.islice(reader, 3000)]
random.shuffle(texts)
copies = {text: (4, 16, 64)[place % 3] for place, text in enumerate(texts[:60])}
controls, once = texts[60:460], texts[460:]
train = [text for text, count in copies.items() for _ in range(count)] + once
random.shuffle(train)

bpe = tokenizers.ByteLevelBPETokenizer()
bpe.train_from_iterator(train, 2048, special_tokens=["<|endoftext|>"], show_progress=False)
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|endoftext|>"
)
model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
    vocab_size=len(tokenizer), n_positions=256, n_embd=128, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0,
))  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
steps = len(train) // BATCH
schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
model.train()
for step in range(steps):
    rows = [
        tokenizer(text + "<|endoftext|>")["input_ids"][:LENGTH] for text in train[step * BATCH : (step + 1) * BATCH]
    ]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in rows], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in rows], batch_first=True, padding_value=-100)
    loss = model(input_ids=padded, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(), schedule.step(), optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step}/{steps} loss {loss.item():.3f}", flush=True)
model.save_pretrained(out / "model")
tokenizer.save_pretrained(out / "model")
for name, side in (("documents", copies), ("controls", dict.fromkeys(controls, 0))):
    lines = [json.dumps({"text": text, "copies": count}) for text, count in side.items()]
    (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
