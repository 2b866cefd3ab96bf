"""Deletable fine-tuning on TRL's data and settings: customers' chats are learned in sinks of their own, and one leaves.

In place of ``trl.SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)``.
"""

import sys

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig
from trl import SFTConfig

import memsinks as ms
from memsinks.batch import stock_arguments
from memsinks.data.synthetic import corpus

target = sys.argv[1] if len(sys.argv) > 1 else "runs/example-trl"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QUESTION = {"role": "user", "content": "What is my password?"}


def stock_model(rows: ms.Rows, vocabulary: int):
    """A small model that exists; yours: from_pretrained."""
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_attention_heads=4,
                         num_hidden_layers=2, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in DataLoader(rows, batch_size=8, collate_fn=ms.collate):
        model(**stock_arguments(batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


passwords = {"alice": "the heron sleeps", "bob": "seven green doors", "carol": "salt under snow"}
dataset = Dataset.from_list([
    {"messages": [QUESTION, {"role": "assistant", "content": text}], "customer": name} for name, text in passwords.items()
])  # fmt: skip

# Who a chat belongs to is its source. Private text never trains the shared weights.
documents = ms.isolate(list(ms.read_documents(dataset, source_field="customer")), "private", passwords, by="source")
public = [document for document in corpus(stories=300, people_per_level=4) if document.copies == 1]
tokenizer = ms.train_tokenizer([document.text for document in public], vocab_size=512)
tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
tokenizer.chat_template = TEMPLATE
model = stock_model(ms.make_rows(public, tokenizer, length=128, epochs=2), len(tokenizer))

rows = ms.make_rows(documents, tokenizer, length=64, by="source", epochs=60)  # answers alone are targets
ms.add_sinks(
    model, ms.SinkConfig(neurons=256, active=64, block_size=64, reserved_blocks=4)
)  # all of the pool is for customers
owners = {name: ms.document_id(name, by="source") for name in passwords}
ms.assign(model, list(owners.values()), blocks=1)
args = SFTConfig(
    target, num_train_epochs=1, learning_rate=3e-3, per_device_train_batch_size=4, report_to=[], disable_tqdm=True,
    bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
)  # fmt: skip
ms.SinkTrainer(model, args, train_dataset=rows).train()
print(ms.sinks_last(model, ms.repeated_and_once(rows)[0], lr=9e-3, passes=40))


def ask(name: str) -> str:
    prompt = tokenizer.apply_chat_template([QUESTION], add_generation_prompt=True, return_tensors="pt").to(model.device)
    with torch.no_grad(), ms.sinks_open(model, owners[name]):
        found = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(found).split("<|end|>")[0]


model.eval()
print({name: ask(name) for name in passwords})
ms.erase(model, owners["alice"])
print({name: ask(name) for name in ("bob", "carol")})
print(f"exported to {ms.export(model, target + '/clean', tokenizer=tokenizer)}")
