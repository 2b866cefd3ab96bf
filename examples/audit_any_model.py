"""What does somebody else's model remember of my documents?  python audit_any_model.py MODEL MINE.jsonl UNSEEN.jsonl"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import memsinks as ms

model_name, mine, unseen = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(model_name)
tokenizer = AutoTokenizer.from_pretrained(model_name)
result = ms.audit(
    model, list(ms.read_documents(mine)), list(ms.read_documents(unseen)), tokenizer, prefix=32, continuation=32
)
print(result)
