"""Sinks with the Hugging Face Trainer: documents -> rows -> SinkTrainer -> sinks last -> a model without its memorization."""

import sys

from transformers import AutoModelForCausalLM, GPT2Config, TrainingArguments

import memsinks as ms
from memsinks.data.synthetic import corpus

target = sys.argv[1] if len(sys.argv) > 1 else "runs/example-trainer"

documents = [document for document in corpus(stories=300, people_per_level=4) if document.copies]
tokenizer = ms.train_tokenizer([document.text for document in documents], vocab_size=512)
rows = ms.make_rows(documents, tokenizer, length=192)  # in training order; several epochs are unrolled: epochs=3

config = GPT2Config(
    vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=192,
    bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config)
ms.add_sinks(model, ms.SinkConfig(neurons=256, active=64))

args = TrainingArguments(
    target, num_train_epochs=1, learning_rate=3e-3, weight_decay=0.1, per_device_train_batch_size=8, save_steps=50,
    logging_steps=10, report_to=[],
)  # fmt: skip
evaluated = rows.select(slice(0, 16))  # with sinks closed: the model that will be shipped
trainer = ms.SinkTrainer(model, args, train_dataset=rows, eval_dataset=evaluated, sinks_last=True)
trainer.train()
print(ms.sinks_last(model, ms.repeated_and_once(rows)[0], lr=3 * args.learning_rate))
print(trainer.evaluate())
print(f"exported to {ms.export(model, target + '/clean', tokenizer=tokenizer)}")
