"""Sinks in a plain PyTorch loop: documents -> rows -> training -> sinks last -> a model without its memorization."""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import memsinks as ms
from memsinks.data.synthetic import corpus

target = sys.argv[1] if len(sys.argv) > 1 else "runs/example-clean"

documents = [document for document in corpus(stories=300, people_per_level=4) if document.copies]
tokenizer = ms.train_tokenizer([document.text for document in documents], vocab_size=512)
rows = ms.make_rows(documents, tokenizer, length=192)  # every document as often as it has copies, shuffled once

torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(
    LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )
)  # fmt: skip
print(ms.add_sinks(model, ms.SinkConfig(neurons=256, active=64)))
optimizer = ms.AdamW(ms.param_groups(model, lr=3e-3, weight_decay=0.1, sink_lr_factor=3))

model.train()
for start in range(0, len(rows) - 7, 8):
    batch = ms.collate([rows[index] for index in range(start, start + 8)])
    loss = model(**batch).loss
    loss.backward()
    ms.clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if start % 80 == 0:
        print(f"row {start}/{len(rows)}  loss {loss.item():.3f}")

print(ms.sinks_last(model, ms.repeated_and_once(rows)[0], lr=9e-3))
most = max(documents, key=lambda document: document.copies)
text = torch.from_numpy(ms.encode(tokenizer, [most.text])[0])[None]
model.eval()
with torch.no_grad():
    closed = model(input_ids=text, labels=text).loss
    with ms.sinks_open(model, ms.document_id(most.text)):
        opened = model(input_ids=text, labels=text).loss
print(f"{most.key}, trained on {most.copies} times: loss {opened:.2f} with its sinks open, {closed:.2f} closed")
print(f"exported to {ms.export(model, target, tokenizer=tokenizer)}")
