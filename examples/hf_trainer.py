"""Sinks with the Hugging Face Trainer: sinks learn first, one callback, an optimizer with groups, a sequential sampler."""

import sys

from transformers import AutoModelForCausalLM, GPT2Config, TrainingArguments

import memsinks as ms
from memsinks.data.synthetic import corpus

target = sys.argv[1] if len(sys.argv) > 1 else "runs/example-trainer"

documents = [document for document in corpus(stories=300, people_per_level=4) if document.copies]
tokenizer = ms.train_tokenizer([document.text for document in documents], vocab_size=512)
order = ms.training_order(documents)
ids, groups = ms.identify(documents)
tokens = ms.encode(tokenizer, [document.text for document in documents])
rows = ms.pack(
    [tokens[index] for index in order], ids[order], ms.exposures(groups[order]),
    length=192, pad_id=tokenizer.pad_token_id,
)  # fmt: skip

model = AutoModelForCausalLM.from_config(
    GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=192,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )
)  # fmt: skip
ms.add_sinks(model, ms.SinkConfig(neurons=256, active=64))

trainer = ms.SinkTrainer(
    model,
    TrainingArguments(
        target, per_device_train_batch_size=8, max_steps=len(rows) // 8, report_to=[], save_steps=50, logging_steps=10,
        train_sampling_strategy="sequential",  # exposures are numbered over the training order
    ),
    train_dataset=rows,
    eval_dataset=rows.select(slice(0, 16)),  # evaluated with sinks closed: the model that will be shipped
    data_collator=ms.collate,
    optimizers=(ms.AdamW(ms.param_groups(model, lr=3e-3, weight_decay=0.1, sink_lr_factor=3)), None),
    callbacks=[ms.SinkCallback()],
)  # fmt: skip
trainer.train()
print(ms.settle(model, *ms.settling_texts(rows), lr=3e-4))
print(trainer.evaluate())
print(f"exported to {ms.export(model, target + '/clean', tokenizer=tokenizer)}")
