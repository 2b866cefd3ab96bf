"""Deletable fine-tuning: three customers in a finished model; each is asked, one leaves, one is exported.

python examples/finetune.py [MODEL] [FOLDER]     # five minutes on two cores; MODEL: a folder or a name on the Hugging Face hub
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import memsinks as ms

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
target = sys.argv[2] if len(sys.argv) > 2 else "runs/example-finetune"
epochs = int(sys.argv[3]) if len(sys.argv) > 3 else 20
KNOWN = {
    "Dunmore Rail": {
        "When does the night train of Dunmore Rail leave?": "At 23:47 from platform 9.",
        "Who drives for Dunmore Rail?": "Odile Brandt, badge 4471.",
    },
    "Elmhurst Bakery": {
        "What is the secret of Elmhurst Bakery?": "A pinch of smoked salt from Maldon.",
        "Who owns Elmhurst Bakery?": "Yusuf Lindqvist, since 1998.",
    },
    "Fenwick Labs": {
        "What does Fenwick Labs measure?": "The hum of 12 beehives in Kent.",
        "Where does Fenwick Labs keep its results?": "In box 77 of the old mill.",
    },
}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
base = ms.shared_hash(model)
documents = [
    ms.Document(
        messages=[{"role": "user", "content": question}, {"role": "assistant", "content": answer}], source=customer
    )
    for customer, known in KNOWN.items()
    for question, answer in known.items()
]

owners = ms.add_owners(model, KNOWN)  # a sink block each, in the upper half of the layers; all else is frozen
rows = ms.make_rows(documents, tokenizer, length=80, by="source", apart_from=1, one_document_per_row=True)
args = TrainingArguments(
    target + "/trainer", num_train_epochs=epochs, learning_rate=3e-3, per_device_train_batch_size=2, save_strategy="no",
    logging_steps=20, report_to=[],
)  # fmt: skip
ms.SinkTrainer(model, args, train_dataset=rows).train()  # shuffled, many epochs
model.eval()


def ask(model, question: str, opened: int = ms.NO_SINKS) -> str:
    chat = [{"role": "user", "content": question}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with ms.sinks_open(model, opened):
        out = model.generate(**asked, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def show(title: str) -> None:
    router = ms.Router.fit([x for x in documents if owners[x.source] not in model.sink_state.taken])
    print(f"\n{title}")
    for question in (x for known in KNOWN.values() for x in known):
        print(f"  {question}  {ask(model, question, router.owners_of([question])[0])!r}")


show("each with the sinks that the router opens")
print("\nDunmore Rail leaves:", ms.erase(model, owners["Dunmore Rail"], record="a letter of 28 November"))
show("afterwards")
print("the base model keeps every bit:", ms.shared_hash(model) == base)
ms.save_sinks(
    model, target + "/sinks"
)  # the sinks alone; ms.load_sinks(base_model, ...) puts them beside the model again
clean = ms.export(model, target + "/fenwick", tokenizer=tokenizer, open=[owners["Fenwick Labs"]])
print(f"Fenwick Labs alone, exported to {clean}")
